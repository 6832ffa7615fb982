"""What runs in bfloat16 within the block, and what does not."""

import pytest
import torch
from torch import nn

from convrewrite import precision
from convrewrite.precision import bfloat16_pays, in_bfloat16

EPS = torch.finfo(torch.bfloat16).eps


def seen(conv: nn.Module, wanted: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a convolution gives within the block, and the gradient of its weight, both beside those in float32."""
    torch.manual_seed(0)
    x = torch.randn(2, conv.in_channels, *[9] * (conv.weight.dim() - 2))
    with in_bfloat16(wanted):
        found = conv(x)
    assert not torch.is_autocast_enabled("cpu")
    found.float().square().sum().backward()
    return found, conv(x), conv.weight.grad


NARROW = {
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "multiplier": nn.Conv2d(8, 16, 3, stride=2, groups=8),
    "small groups": nn.Conv2d(16, 16, 3, groups=4),
    "one-dimensional": nn.Conv1d(8, 8, 3, groups=8),
    "three-dimensional": nn.Conv3d(4, 4, 3, groups=4),
    "transposed": nn.ConvTranspose2d(8, 8, 3, groups=8),
}


@pytest.mark.parametrize("conv", NARROW.values(), ids=NARROW)
def test_narrow_groups_work_in_float32_and_give_bfloat16(conv: nn.Module) -> None:
    found, exact, gradient = seen(conv)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())
    assert gradient.dtype == torch.float32 and bool(gradient.isfinite().all())


WIDE = {
    "dense": nn.Conv2d(8, 8, 3),
    "wide groups": nn.Conv2d(32, 32, 3, groups=2),
    "transposed": nn.ConvTranspose2d(16, 16, 3, groups=2),
}


@pytest.mark.parametrize("conv", WIDE.values(), ids=WIDE)
def test_others_work_in_bfloat16(conv: nn.Module) -> None:
    found, exact, _ = seen(conv)
    assert found.dtype == torch.bfloat16 and not torch.equal(found, exact.bfloat16())
    torch.testing.assert_close(found.float(), exact, rtol=2 * EPS, atol=4 * EPS)


def test_nothing_is_cast_where_it_is_not_wanted() -> None:
    found, exact, _ = seen(nn.Conv2d(8, 8, 3), wanted=False)
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_only_models_in_float32_on_a_processor_with_units_for_it_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    for units in (True, False):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda units=units: units)
        assert bfloat16_pays(nn.Conv2d(3, 3, 1)) == units
        assert not bfloat16_pays(nn.Conv2d(3, 3, 1).double())
        assert not bfloat16_pays(nn.Conv2d(3, 3, 1).to("meta"))
        assert not bfloat16_pays(nn.ReLU())
