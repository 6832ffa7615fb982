"""Steps of matrices are made orthogonal, so that all directions of a matrix move alike.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with its quintic iteration of Newton and
Schulz: it takes only products of matrices and brings singular values to between 0.7 and 1.2, which is near enough to one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ITERATIONS = 5
"""The author's own number, which brings singular values from a thousandth of the largest up near to one."""

FIRST, THIRD, FIFTH = 3.4445, -4.7750, 2.0315
"""The author's coefficients of the odd polynomial that is applied to the singular values in each iteration."""

FEWEST = 4
"""A matrix with at least this many rows and columns has enough directions for this to matter."""

LEAST = 1e-30
"""This is added to norms, so that a step of zeros stays zero."""


def is_matrix(parameter: Tensor) -> bool:
    """Whether a kernel ``(O, C, ...)`` maps several channels to several: a depthwise kernel does not, and a bias is not a
    matrix, nor is what has no numbers."""
    if parameter.dim() < 2 or parameter.numel() == 0 or parameter.shape[1] == 1:
        return False
    return min(len(parameter), parameter[0].numel()) >= FEWEST


def orthogonal(steps: Sequence[Tensor]) -> list[Tensor]:
    """Kernels ``(O, C, ...)``, made nearly orthogonal as matrices ``(O, rest)``, each with a root mean square of one. Kernels of
    the same shape are computed together."""
    places: dict[tuple[int, int], list[int]] = {}
    for place, step in enumerate(steps):
        places.setdefault((len(step), step[0].numel()), []).append(place)
    found: list[Tensor] = list(steps)
    for shape, members in places.items():
        made = _iterated(torch.stack([steps[place].reshape(shape) for place in members]))
        for place, matrix in zip(members, made, strict=True):
            found[place] = matrix.reshape(steps[place].shape)
    return found


def _iterated(matrices: Tensor) -> Tensor:
    """Matrices ``(N, rows, columns)``, all made orthogonal, at least in single precision, which the iteration needs."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(torch.promote_types(matrices.dtype, torch.float32))
    x = x / (_norms(x) + LEAST)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = FIRST * x + (THIRD * square + FIFTH * square @ square) @ x
    x = x * ((x.shape[1] * x.shape[2]) ** 0.5 / (_norms(x) + LEAST))
    return (x.mT if tall else x).to(matrices.dtype)


def _norms(matrices: Tensor) -> Tensor:
    return matrices.flatten(1).norm(dim=1)[:, None, None]
