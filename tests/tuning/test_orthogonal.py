"""Steps of matrices are near to orthogonal, those of everything else stay as they are."""

import pytest
import torch
from torch import Tensor, nn

from convrewrite.tuning.orthogonal import is_matrix, orthogonal
from convrewrite.tuning.stepping import Stepper


def singular(kernel: Tensor) -> Tensor:
    return torch.linalg.svdvals(kernel.flatten(1).double())


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (8, 8), (12, 4, 3, 1), (5, 7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_directions_move_alike(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = torch.randn(shape).mul(torch.linspace(0.1, 1, shape[0]).view(-1, *(1,) * (len(shape) - 1))).to(dtype)
    (found,) = orthogonal([given])
    assert found.shape == given.shape and found.dtype == dtype
    assert float(found.double().square().mean().sqrt()) == pytest.approx(1, rel=2e-2)
    assert (
        float(singular(found).max() / singular(found).min()) < 2 < float(singular(given).max() / singular(given).min())
    )
    assert float((found.double() * given.double()).sum()) > 0, "still downhill"


def test_each_is_what_it_is_alone_and_scale_does_not_matter() -> None:
    torch.manual_seed(0)
    given = [torch.randn(6, 5), torch.randn(4, 4, 3, 3), torch.randn(6, 5)]
    together = orthogonal(given)
    for one, found in zip(given, together, strict=True):
        assert torch.allclose(found, orthogonal([one * 1e-6])[0], rtol=1e-4, atol=1e-4)


def test_a_step_of_zeros_stays_one() -> None:
    assert not orthogonal([torch.zeros(5, 4)])[0].any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 8), True),
        ((8, 4, 3, 3), True),
        ((8,), False),
        ((8, 1, 3, 3), False),
        ((3, 64), False),
        ((64, 3, 1, 1), False),
        ((0, 5), False),
        ((5, 0, 3, 3), False),
    ],
)
def test_which_kernels_are_matrices(shape: tuple[int, ...], expected: bool) -> None:
    assert is_matrix(torch.zeros(shape)) is expected


def test_only_matrices_take_orthogonal_steps_of_a_part_of_their_size() -> None:
    torch.manual_seed(0)
    own = {"kernel": nn.Parameter(torch.randn(6, 5, 3, 3)), "bias": nn.Parameter(torch.randn(6))}
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    stepper = Stepper(own, {"kernel": 2.0, "bias": 3.0}, orthogonal=True)
    for parameter in own.values():
        parameter.grad = torch.randn_like(parameter)
    stepper.step(0.01)
    moved = {name: start[name] - parameter.detach() for name, parameter in own.items()}
    assert float(moved["kernel"].square().mean().sqrt()) == pytest.approx(0.02, rel=1e-2)
    assert float(singular(moved["kernel"]).max() / singular(moved["kernel"]).min()) < 2
    assert moved["bias"].abs() == pytest.approx(torch.full((6,), 0.03).numpy(), rel=1e-2), (
        "Adam's first step is one of signs"
    )
    assert not stepper.second["kernel"].any() and bool(stepper.second["bias"].all())
