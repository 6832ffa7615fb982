"""The effect of bfloat16 alone: of a model that runs in it, and where it cannot, or would gain nothing."""

import math

import pytest
import torch
from networks import natural
from torch import Tensor, nn

from convrewrite import precision
from convrewrite.meanings import rounding_of, tell
from convrewrite.modules import named_outputs, run


class Scattering(nn.Module):
    """Writes what a convolution gives into numbers of another type, which torch refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        place = torch.zeros(len(x), 8, *y.shape[2:])
        return place.index_add(1, torch.tensor([0, 2, 4, 6]), y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 5)).eval()


def rounding(model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    inputs = (natural(8, 3, 12, 12, dtype),)
    pairs = [(inputs, named_outputs(run(model, inputs)))]
    return rounding_of(model, pairs, tell(model, [inputs]))


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)


def test_the_effect_is_that_of_eight_bits_and_leaves_the_model_as_it_was() -> None:
    model = network()
    eps = torch.finfo(torch.bfloat16).eps
    assert 0 < rounding(model) < 4 * eps**2 * 512
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_that_does_not_run_in_it_is_left_in_float32() -> None:
    assert rounding(Scattering().eval()) == math.inf
    assert not torch.is_autocast_enabled("cpu")


def test_doubles_and_processors_without_units_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounding(network().double(), torch.float64) == math.inf
    assert rounding(nn.ReLU()) == math.inf
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    assert rounding(network()) == math.inf
