"""The squared distance that training minimises, against the formula operator by operator."""

import math

import pytest
import torch
from torch import Tensor

from convrewrite.meanings import Meaning
from convrewrite.tuning.losses import output_loss, relative_loss


def plainly(wanted: Tensor, found: Tensor, scale: float) -> Tensor:
    difference = torch.where(wanted == found, 0.0, found - wanted)
    return difference.square().mean() / scale


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (7,), (), (0, 3)])
def test_the_distance_and_its_gradient_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, found, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    other = found.clone().requires_grad_()
    found.requires_grad_()
    one, two = relative_loss(wanted, found, 1.7), plainly(wanted, other, 1.7)
    if not wanted.numel():
        assert one == 0
        return
    torch.testing.assert_close(one, two)
    (3 * one).backward()
    (3 * two).backward()
    torch.testing.assert_close(found.grad, other.grad)


def test_bfloat16_is_summed_in_float32() -> None:
    wanted = torch.randn(64, 8, 28, 28, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = (wanted + 0.1 * wanted.abs()).requires_grad_()
    loss = relative_loss(wanted, found, 1.0)
    assert loss.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps
    expected = (found.detach() - wanted).double().square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=eps**2 * 64)
    loss.backward()
    assert found.grad is not None and found.grad.dtype == torch.bfloat16


def test_the_same_infinity_is_no_difference_and_other_ones_are() -> None:
    wanted = torch.tensor([math.inf, -math.inf, 1.0, 2.0])
    found = torch.tensor([math.inf, -math.inf, 1.0, 4.0], requires_grad=True)
    loss = relative_loss(wanted, found, 1.0)
    assert loss.item() == 1.0
    loss.backward()
    assert found.grad is not None and found.grad.tolist() == [0, 0, 0, 1]
    assert relative_loss(wanted, -found, 1.0).isinf()
    assert relative_loss(wanted, found * math.nan, 1.0).isnan()


def test_no_gradient_leads_to_what_is_wanted() -> None:
    wanted, found = (torch.ones(3, requires_grad=True) * k for k in (1.0, 2.0))
    relative_loss(wanted, found, 1.0).backward()
    assert wanted.grad_fn is not None and not relative_loss(wanted, found.detach(), 1.0).requires_grad


def test_values_in_float64_are_subtracted_in_float64() -> None:
    wanted = torch.full((4, 3), 1e6, dtype=torch.float64)
    loss = output_loss(wanted, wanted + 1e-3, Meaning("values", ""), 1.0)
    assert loss.item() == pytest.approx(1e-6, rel=1e-6)
