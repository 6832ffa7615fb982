"""Steps of matrices that are made orthogonal, so that all of a matrix's directions move alike.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with its quintic iteration of Newton and
Schulz: products of matrices alone, which bring singular values to within 0.7 and 1.2 of each other, and that is near enough.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ITERATIONS = 5
"""The author's own number; singular values from a thousandth of the largest on are then near to one."""

FIRST, THIRD, FIFTH = 3.4445, -4.7750, 2.0315
"""The author's coefficients of the odd polynomial that is applied to the singular values in each iteration."""

FEWEST = 4
"""Rows and columns of a matrix from which on it has directions enough to be told apart."""

LEAST = 1e-30
"""What is added to norms, so that a step of zeros stays one."""


def is_matrix(parameter: Tensor) -> bool:
    """Whether a kernel maps several channels to several, ``(O, C, ...)``: a depthwise one does not, nor is a bias a matrix."""
    return parameter.dim() >= 2 and parameter.shape[1] > 1 and min(len(parameter), parameter[0].numel()) >= FEWEST


def orthogonal(steps: Sequence[Tensor]) -> list[Tensor]:
    """Kernels ``(O, C, ...)`` as matrices ``(O, rest)`` made near to orthogonal, each with a root mean square of one. Those of
    one shape go through together."""
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
    """``(N, rows, columns)``, all made orthogonal in single precision at least, which the iteration needs."""
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
