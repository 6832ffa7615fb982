"""Layers that a forward calls with their input by its name, as ``self.conv(input=x)``."""

import pytest
import torch
from networks import natural
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite import optimize
from convrewrite.rules.schema import Protect, Rule
from convrewrite.tuning.composition import composed

X = natural(32, 3, 10, 10, torch.float32)
PROTECT = Protect(stem=False, min_channels=0, min_mac_share=0)


class Named(nn.Module):
    """Convolutions, a BatchNorm and a linear layer, all called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)
        assert self.norm.running_mean is not None
        self.norm.running_mean.uniform_(-0.1, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(input=F.relu(self.norm(input=self.conv(input=x))))
        return self.head(input=F.relu(input=x).mean((2, 3)))


@pytest.mark.parametrize("structure", ["separable", "asymmetric", "grouped", "channel", "tucker", "cp"])
def test_whatever_takes_a_convolutions_place_is_called_as_it_was(structure: str) -> None:
    rule = Rule(name="r", structures=(structure,), protect=PROTECT, ratio=0.9)
    result = optimize(Named().eval(), X[:1], [rule], X, measure=False, refine=True, only="last")
    rewritten = {row.name for row in result.report.sites if row.action == "rewritten"}
    assert rewritten == {"last"}
    with composed(result.model, ["last"]):
        assert result.model(X).shape == (32, 5)


def test_inputs_are_synthesised() -> None:
    rule = Rule(name="r", structures=("channel",), protect=PROTECT, ratio=0.5)
    result = optimize(Named().eval(), X[:1], [rule], measure=False, fast=True)
    assert result.report.calibration.kind == "synthetic"
