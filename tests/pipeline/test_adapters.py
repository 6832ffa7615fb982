"""Convolutions whose kernel is computed from more, or fewer, parameters than it has numbers: what they cost before and after."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Calls, settled
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import convrewrite
from convrewrite.pipeline.prepare import prepare

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class LowRank(nn.Module):
    """An adapter as those of LoRA: a kernel and a product of two thin matrices."""

    def __init__(self, kernel: Tensor, rank: int = 4) -> None:
        super().__init__()
        self.down = nn.Parameter(0.1 * torch.randn(len(kernel), rank))
        self.up = nn.Parameter(0.1 * torch.randn(rank, kernel[0].numel()))

    def forward(self, kernel: Tensor) -> Tensor:
        return kernel + (self.down @ self.up).view_as(kernel)


class Factored(nn.Module):
    """A kernel of rank one over its taps, computed at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.taps, self.mixing = nn.Parameter(torch.randn(1, 9)), nn.Parameter(torch.randn(24, 24, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.mixing @ self.taps).view(24, 24, 3, 3), padding=1)


def adapted() -> nn.Conv2d:
    conv = nn.Conv2d(24, 24, 3, padding=1)
    register_parametrization(conv, "weight", LowRank(conv.weight))
    return conv


def network(middle: Callable[[], nn.Module]) -> nn.Module:
    return settled(
        Calls(
            lambda m, x: m.last(F.relu(m.middle(F.relu(m.stem(x))))),
            stem=nn.Conv2d(3, 24, 3, padding=1), middle=middle(), last=nn.Conv2d(24, 24, 3, padding=1),
        )
    )  # fmt: skip


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("middle", [adapted, Factored])
@pytest.mark.parametrize("exclude", ["middle", "last"])
def test_what_a_kernel_is_made_of_counts_and_making_it_does_not(middle: Callable[[], nn.Module], exclude: str) -> None:
    model = network(middle)
    result = convrewrite.optimize(
        model, X, ["separable"], "weights", exclude=(exclude,), fast=True, measure=False, any_speed=True
    )
    totals = result.report.totals
    assert (totals.parameters.before, totals.parameters.after) == (size(model), size(result.model))
    assert totals.macs.before == 100 * 9 * (3 * 24 + 2 * 24 * 24)
    row = next(row for row in result.report.sites if row.name == "middle")
    assert row.parameters_before == size(model.get_submodule("middle"))
    assert row.action == ("kept" if exclude == "middle" else "rewritten")


def test_a_parameter_that_another_module_holds_too_stays() -> None:
    model = network(Factored)
    model.other = nn.ParameterList([model.get_parameter("middle.mixing")])
    prepared = prepare(model, (X,), [])
    middle = next(site for site in prepared.sites if site.name == "middle")
    assert middle.cost.parameters == 9
    assert prepared.totals.parameters == size(model)
