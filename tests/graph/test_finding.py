"""Sites that the model asks more of than to be called."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import Branching, CalledTwice, Calls, Chain, NineKinds, Residual, TwoNames, settled, state_bytes
from torch import Tensor, nn

from convrewrite import optimize
from convrewrite.graph.finding import (
    LIFTED_LATE,
    MADE_LATE,
    REASON,
    WEIGHT_HELD_ELSEWHERE,
    find,
    on_other_paths,
    without_irreplaceable,
)
from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.modules import copy_model

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Forward = Callable[[Calls, Tensor], Tensor]

FORWARDS: dict[str, Forward] = {
    "dtype of its weight": lambda m, x: m.last(m.asked(m.first(x).to(m.asked.weight.dtype))),
    "groups": lambda m, x: m.last(m.asked(m.first(x)[:, : 8 * m.asked.groups])),
    "type": lambda m, x: m.last(m.asked(m.first(x)) if isinstance(m.asked, nn.Conv2d) else m.first(x)),
    "type, without failing": lambda m, x: m.last(m.asked(m.first(x)) * (2 if type(m.asked) is nn.Conv2d else 3)),
    "its own method": lambda m, x: m.last(m.asked._conv_forward(m.asked(m.first(x)), m.asked.weight, None)),
}
every_forward = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())


def network(forward: Forward) -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3))
    return settled(Calls(forward, **dict(zip(("first", "asked", "last"), layers, strict=True))))


@every_forward
def test_a_site_whose_attributes_or_type_are_asked_for_is_refused_and_no_other(forward: Forward) -> None:
    model = network(forward)
    before = state_bytes(model)
    _, _, sites = find(model, (X,))
    refused = {site.name for site in sites if site.refusal is not None}
    assert "asked" in refused
    assert not {"first", "last"} & refused
    assert state_bytes(model) == before
    assert type(model.asked) is nn.Conv2d


class Kept(nn.Module):
    """Keeps what it computes in its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.asked = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = self.once()
        return self.asked(self.first(x)) * self.scale

    def once(self) -> Tensor:
        """What the first run computes."""
        return self.asked.weight.detach().norm()


class Later(Kept):
    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            x = x + 0 * self.asked.weight.detach().norm()
        return super().forward(x)

    def once(self) -> Tensor:
        return torch.ones(())


class Listed(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.asked.weight]

    def once(self) -> Tensor:
        return self.weights[0].detach().norm()


class Biased(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.biases = [self.asked.bias]

    def once(self) -> Tensor:
        return self.biases[0].detach().norm()  # type: ignore[union-attr]


class Summed(Kept):
    """Has a norm of a weight in its state."""

    def once(self) -> Tensor:
        return torch.ones(())

    def get_extra_state(self) -> Tensor:
        return super().once()

    def set_extra_state(self, _state: Tensor) -> None:
        """It is never read."""


class Flattened(Summed):
    """Flattens a weight wherever it is moved to, as recurrent layers do."""

    def get_extra_state(self) -> Tensor:
        return torch.ones(())

    def _apply(self, *args: Any, **named: Any) -> Any:
        moved = super()._apply(*args, **named)
        self.flat = self.asked.weight.detach().flatten()
        return moved


class Made(Kept):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "made"):
            self.made = nn.Conv2d(8, 8, 1)
            nn.init.ones_(self.made.weight), nn.init.zeros_(self.made.bias)  # type: ignore[arg-type]
        return self.made(self.asked(self.first(x)))


@pytest.mark.parametrize(
    ("make", "name", "why"),
    [
        (Kept, "asked", REASON),
        (Later, "asked", REASON),
        (Listed, "asked", WEIGHT_HELD_ELSEWHERE),
        (Biased, "asked", WEIGHT_HELD_ELSEWHERE),
        (Summed, "asked", REASON),
        (Flattened, "asked", REASON),
        (Made, "made", MADE_LATE),
    ],
)
def test_what_a_first_run_and_later_runs_ask_of_a_site_is_seen_before_anything_is_fitted(
    make: Callable[[], nn.Module], name: str, why: str
) -> None:
    model = settled(make())
    _, _, sites = find(copy_model(model), (X,))
    assert {site.name: site.refusal for site in sites if site.refusal} == {name: why}


def test_a_functional_call_that_only_a_second_run_shows_stays_one() -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
            self.kept: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            if not self.kept:
                self.kept.append(float(x.sum()))  # which stops what follows a forward
            return nn.functional.conv2d(x, self.weight)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Filter()).eval()
    lifted, _, sites = find(copy_model(model), (X,))
    assert not lifted.lifts
    assert {site.name: LIFTED_LATE in (site.refusal or "") for site in sites} == {"0": False, "1#0": True}


def test_what_other_sizes_ask_of_a_site_and_which_batch_norm_they_go_around_is_seen() -> None:
    def forward(m: Calls, x: Tensor) -> Tensor:
        y = m.first(x)
        if x.shape[-1] > 16:
            return m.asked(y) / m.asked.weight.norm()
        return m.asked(m.norm(y))

    layers = {"first": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "asked": nn.Conv2d(8, 8, 3)}
    model = settled(Calls(forward, **layers))
    _, _, sites = find(model, (X,))
    assert {site.name: site.refusal for site in sites} == {"first": None, "asked": REASON}
    found = without_irreplaceable(model, (X,), [replace(sites[0], batch_norm="norm")])
    assert found[0].batch_norm == "norm"
    assert on_other_paths(model, [(X.repeat(1, 1, 2, 2),), (X[:, :, :1, :1],)], found)[0].batch_norm is None


def test_a_site_that_is_asked_for_more_on_a_calibration_input_is_kept() -> None:
    model = network(lambda m, x: m.last(m.asked(m.first(x)) * (m.asked.weight.norm() if x[0].mean() < -1 else 1)))
    images = torch.cat([X, X - 3] * 4)
    report = optimize(model, X, rules=["separable"], calibration=images, measure=False, refine=False).report
    assert [row.reason for row in report.sites if row.name == "asked"] == [REASON]


def test_such_a_model_comes_through() -> None:
    model = network(FORWARDS["groups"])
    report = optimize(model, X, calibration="weights", measure=False).report
    assert {row.name: row.action for row in report.sites} == {"first": "kept", "asked": "kept", "last": "rewritten"}
    (reason,) = [row.reason for row in report.sites if row.name == "asked"]
    assert reason == REASON


@pytest.mark.parametrize(
    "more",
    [lambda norm, _held: norm.eps, lambda _norm, held: held[0].view(1, -1, 1, 1)],
    ids=["an attribute", "a weight, through a list"],
)
def test_a_batch_norm_that_is_asked_for_more_is_not_folded(more: Callable[[nn.Module, list[Tensor]], Any]) -> None:
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    held = [norm.weight]
    model = settled(Calls(lambda m, x: m.norm(m.conv(x)) + more(m.norm, m.held), conv=conv, norm=norm))
    model.held = held
    _, _, (site,) = find(model, (X,))
    assert (site.refusal, site.batch_norm) == (None, None)


@pytest.mark.parametrize("make", [Chain, Residual, CalledTwice, TwoNames, NineKinds, Branching])
def test_sites_that_are_only_called_stay(make: Callable[[], nn.Module]) -> None:
    model = settled(make())
    sites = find_sites(model, (X,), trace(model))
    assert without_irreplaceable(model, (X,), sites) == tuple(sites)


def test_a_model_that_never_gives_the_same_twice_says_nothing() -> None:
    draw = np.random.default_rng(0)
    model = Calls(
        lambda m, x: m.last(m.first(x) + float(draw.random())), first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 8, 3)
    )
    _, _, sites = find(model.eval(), (X,))
    assert [site.refusal for site in sites] == [None, None]


class Decoder(nn.Module):
    """Has the weights of an encoder that other modules hold, too."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.encoder.weight.transpose(0, 1).flip(-1, -2))  # type: ignore[operator]


def test_a_site_whose_weight_makes_the_kernel_of_another_one_stays_and_its_parameters_count_once() -> None:
    encoder = nn.Conv2d(8, 8, 3)
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), encoder, Decoder(encoder)))
    _, _, sites = find(model, (X,))
    assert {site.name: site.refusal for site in sites} == {"0": None, "1": REASON, "2": None}
    assert sites[-1].cost.parameters == 0
