"""Convolutions of parameters, of other numbers of examples than the model is given, and in functions that torch transforms."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from networks import natural
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite import Result, optimize
from convrewrite.rules.schema import Protect, Rule

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.7)
X = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions with a body between them, and a linear layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.last(self.body(F.relu(self.stem(x))))).mean((2, 3)))


def rewritten(model: nn.Module, example: Tensor = X) -> Result:
    data = natural(24, 3, 10, 10, torch.float32)
    return optimize(model.eval(), example, [RULE], data, measure=False, fast=True)


def reason(result: Result, name: str) -> str:
    return next(row.reason or "" for row in result.report.sites if row.name == name)


class Reading(nn.Module):
    """Adds what a convolution makes of a parameter, or of a buffer of three examples; ``wide``: of one for each example."""

    def __init__(self, learned: bool, wide: bool = False) -> None:
        super().__init__()
        self.conv, self.read, self.wide = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), wide
        self.given = nn.Parameter(torch.randn(1, 8, 10, 10))
        self.register_buffer("learned", None if learned else torch.randn(3, 8, 10, 10))

    def forward(self, x: Tensor) -> Tensor:
        found = self.read(self.given if self.learned is None else self.learned).mean(0, keepdim=True)
        return F.relu(self.conv(x) + (found.expand(len(x), -1, -1, -1) if self.wide else found))


class Placed(Reading):
    """Adds what a convolution makes of a parameter as it is, and a parameter, before a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.read(self.given) + x)) + self.given)


@pytest.mark.parametrize(
    "body",
    [Reading(True), Reading(True, True), Reading(False), Placed(True)],
    ids=["learned", "wide", "three examples", "placed"],
)
def test_what_is_no_example_may_be_convolved_too(body: nn.Module) -> None:
    result = rewritten(Net(body))
    assert all(row.action == "rewritten" for row in result.report.sites)
    assert result.report.fidelity[0].relative_error < 0.3
    twice = rewritten(Net(body), X.repeat(2, 1, 1, 1))
    assert "where the model is given 2" in reason(twice, "body.read")
    assert {row.name for row in twice.report.sites if row.action == "rewritten"} == {"stem", "body.conv", "last"}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch uses it for derivatives
def test_convolutions_in_functions_that_torch_transforms_stay() -> None:
    class Sloped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y, slope = torch.func.jvp(self.conv, (x,), (torch.ones_like(x),))
            return y + slope

    class Mixed(nn.Module):
        """Two convolutions whose weights are stacked, in a part with parts of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            stacked, _ = torch.func.stack_module_state(list(self.members))
            call = torch.func.functional_call
            return torch.vmap(lambda state: call(self.members[0], state, (x,)))(stacked).mean(0)

    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.inner)(x[:, None])[:, 0]

    for body, name, why in (
        (Sloped(), "body.conv", "a function that torch transforms"),
        (Mixed(), "body.members.0.0", "a function that torch transforms"),
        (Within(), "body.inner.0", "no axis for the examples"),
    ):
        result = rewritten(Net(body))
        assert why in reason(result, name)
        assert {row.name for row in result.report.sites if row.action == "rewritten"} >= {"stem", "last"}


def notes_of_macs_that_add_up(model: nn.Module) -> str:
    """The notes of a report whose totals are what its sites add up to."""
    report = rewritten(model).report
    macs = report.totals.macs
    assert macs.before - macs.after == sum(row.macs_before - row.macs_after for row in report.sites) > 0
    return " ".join(report.notes)


def test_a_result_may_take_another_way_than_the_original() -> None:
    class Chosen(nn.Module):
        """Convolves one example or two, by whether it stands as it was made."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x if len(list(self.parameters())) == 2 else torch.cat([x, x]))[: len(x)]

    assert "for the path that the original took" in notes_of_macs_that_add_up(Net(Chosen()))


def test_derivatives_of_derivatives_are_no_cost_of_a_site() -> None:
    class Curved(Net):
        def forward(self, x: Tensor) -> Any:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                slope = torch.autograd.grad(self.stem(x).square().sum(), x, create_graph=True)[0]
                return super().forward(x).detach(), torch.autograd.grad(slope.square().sum(), x)[0]

    assert "it takes second derivatives" in notes_of_macs_that_add_up(Curved(nn.Identity()))


def test_what_a_thread_of_a_forward_runs_is_counted() -> None:
    class Threaded(Net):
        def forward(self, x: Tensor) -> Any:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(super().forward, x).result()

    assert "its forward starts threads" in notes_of_macs_that_add_up(Threaded(nn.Identity()))


def test_parts_may_be_called_with_what_hangs_on_a_graph_of_gradients() -> None:
    class Sensitive(Net):
        """Gives, beside the scores, how they hang on the image."""

        def forward(self, x: Tensor) -> Any:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                scores = super().forward(x)
                return scores.detach(), torch.autograd.grad(scores.square().sum(), x)[0]

    result = rewritten(Sensitive(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(nn.ReLU()))))
    assert all(row.action == "rewritten" for row in result.report.sites)
