"""What a fit minimises: E of stage kernels, and the moments that a last stage is solved from in closed form.

Nothing as large as the covariance is copied: it is symmetric, so stages are applied to its rows as they lie in memory, each by
one product of matrices (:func:`convrewrite.structures.through`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.fitting.targets import FLOOR, JITTER, FitTarget, Second, Shape, cholesky
from convrewrite.structures import Stage, compose, through

SOLVE_CHUNK = 1 << 25
"""Numbers in one block of intermediate products: 256 MB in float64."""

Loss = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class LastInput:
    """What the last stage is solved from, each of its ``g`` groups by itself: the covariance ``inner (g, q, q)`` of its input
    patches, and their covariance ``cross (g, O / g, q)`` with the wanted output.

    ``inner`` is quadratic in the kernels before; autograd sees only one of the two factors, so half of the gradient.
    """

    inner: Tensor
    cross: Tensor

    @classmethod
    def of(cls, kernels: Sequence[Tensor], stages: Sequence[Stage], second: Second) -> "LastInput":
        """With the kernels of all stages but the last."""
        if _behind_pointwise(stages):
            return _grouped_input(kernels, stages, second)
        if stages[-1].groups > 1:
            reached = _reached(kernels, stages, second.shape, second.covariance)
            return cls(reached @ second.covariance @ reached.mT, _of_groups(second.response, stages) @ reached.mT)
        with torch.no_grad():
            rows = _through_all(kernels, stages, second.shape, second.covariance)
        inner = _through_all(kernels, stages, second.shape, rows.T)
        cross = _through_all(kernels, stages, second.shape, second.response.T)
        return cls(((inner + inner.T) / 2)[None], cross.T[None])

    @classmethod
    def of_diagonals(
        cls, kernels: Sequence[Tensor], stages: Sequence[Stage], given: Sequence[tuple[Tensor, Tensor]], shape: Shape
    ) -> list["LastInput"]:
        """The same for diagonal covariances, each ``given`` by its variances ``(d,)`` and its response ``(O, d)``, for a kernel
        of this ``shape``: the stages are applied once for all of them."""
        if _behind_pointwise(stages):
            return [_grouped_input_of_diagonal(kernels, stages, *each, shape) for each in given]
        reached = _reached(kernels, stages, shape, given[0][0])
        return [cls((reached * v) @ reached.mT, _of_groups(response, stages) @ reached.mT) for v, response in given]

    def optimum(self) -> Tensor:
        """The least-squares kernels ``(g, O / g, q)``."""
        diagonal = self.inner.diagonal(dim1=-2, dim2=-1)
        relative, least = _jitter(diagonal.dtype)
        jitter = (relative * diagonal.mean(-1, keepdim=True) + least).expand_as(diagonal)
        return torch.cholesky_solve(self.cross.mT, cholesky(self.inner + torch.diag_embed(jitter))).mT

    def objective(self, last: Tensor, scale: float) -> float:
        """E with this kernel as the last stage, from these moments alone: no product as large as the covariance. ``scale`` is E
        of a kernel of zeros."""
        kernel = last.reshape(self.cross.shape)
        return scale + float(((kernel @ self.inner - 2 * self.cross) * kernel).sum())


def _jitter(dtype: torch.dtype) -> tuple[float, float]:
    """The part of the mean diagonal that is added to it, and the least that is added: too little for a channel that is always
    zero to lose its kernel."""
    return (JITTER, FLOOR**2) if dtype == torch.float64 else (1e-6, FLOOR)


def _behind_pointwise(stages: Sequence[Stage]) -> bool:
    """Whether the last stage is in groups and has only a dense pointwise before it, which allows less work."""
    return stages[-1].groups > 1 and len(stages) == 2 and stages[0].groups == 1 and stages[0].axes == ""


def _reached(kernels: Sequence[Tensor], stages: Sequence[Stage], shape: Shape, like: Tensor) -> Tensor:
    """What a patch's ``d`` numbers are to the input patches of each group of the last stage, ``(g, q, d)``."""
    units = torch.eye(len(like), dtype=like.dtype, device=like.device)
    return _through_all(kernels, stages, shape, units).unflatten(0, (stages[-1].groups, -1))


def _of_groups(response: Tensor, stages: Sequence[Stage]) -> Tensor:
    """A response ``(O, d)`` by groups of the last stage, ``(g, O / g, d)``."""
    return response.unflatten(0, (stages[-1].groups, -1))


def _grouped_input(kernels: Sequence[Tensor], stages: Sequence[Stage], second: Second) -> LastInput:
    """:meth:`LastInput.of` where :func:`_behind_pointwise`: every group has its own inputs, made by that pointwise alone."""
    last = stages[-1]
    _, channels, height, width = second.shape
    area = height * width
    first = kernels[0][:, :, 0, 0].unflatten(0, (last.groups, -1))  # (g, r, C)
    groups, rank, _ = first.shape
    covariance = second.covariance.reshape(channels, area, channels, area)
    inner = covariance.new_empty(groups, rank, area, rank, area)
    parts = torch.arange(groups).split(max(1, SOLVE_CHUNK // (rank * area * channels)))
    for tap in range(area):  # with itself and the taps after it: the others mirror these
        rows = covariance[:, tap, :, tap:].transpose(1, 2).flatten(1)
        for part in parts:
            a = first[part]
            half = (a.flatten(0, 1) @ rows).reshape(len(part), -1, channels)
            pair = (half @ a.mT).unflatten(1, (rank, -1))  # (g, r, taps, r)
            inner[part, :, tap, :, tap:] = pair.transpose(2, 3)
            inner[part, :, tap:, :, tap] = pair.transpose(1, 3)
    wanted = second.response.reshape(groups, -1, channels, area)
    return LastInput(inner.reshape(groups, rank * area, -1), (first[:, None] @ wanted).flatten(2))


def _grouped_input_of_diagonal(
    kernels: Sequence[Tensor], stages: Sequence[Stage], variances: Tensor, response: Tensor, shape: Shape
) -> LastInput:
    """As above for a diagonal, in which no tap is correlated with another."""
    _, channels, height, width = shape
    first = kernels[0][:, :, 0, 0].unflatten(0, (stages[-1].groups, -1))  # (g, r, C)
    groups, rank, _ = first.shape
    inner = first.new_zeros(groups, rank, height * width, rank, height * width)
    for tap, own in enumerate(variances.reshape(channels, -1).T):
        inner[:, :, tap, :, tap] = (first * own) @ first.mT
    wanted = response.reshape(groups, -1, channels, height * width)
    return LastInput(inner.flatten(3).flatten(1, 2), (first[:, None] @ wanted).flatten(2))


def reduced_loss(stages: Sequence[Stage], target: FitTarget) -> Loss:
    """E after the last stage's optimum, over the target's scale: ``-tr[M H^-1 M^T]``, H the covariance of its input."""
    scale = target.scale + torch.finfo(torch.float64).tiny

    def loss(kernels: list[Tensor]) -> Tensor:
        seen = LastInput.of(kernels, stages, target.second)
        with torch.no_grad():
            last = seen.optimum()
            square = last.mT @ last
        # With the optimal last stage P held fixed, <P^T P, H> - 2 <P, M> has the value and the gradient of E (the
        # envelope theorem), and nothing has to be differentiated through the factorisation.
        quadratic = (square * seen.inner).sum()
        return 1 + (2 * quadratic - quadratic.detach() - 2 * (last * seen.cross).sum()) / scale

    return loss


def _through_all(kernels: Sequence[Tensor], stages: Sequence[Stage], shape: Shape, columns: Tensor) -> Tensor:
    """Columns ``(d, N)`` of patches through all stages but the last, ``(q, N)``, for a kernel of this shape."""
    patches = columns.unflatten(0, shape[1:])
    for stage, kernel in zip(stages[:-1], kernels, strict=False):
        patches = through(stage, kernel, patches)
    return patches.flatten(0, 2)


def full_loss(stages: Sequence[Stage], target: FitTarget) -> Loss:
    """E over the target's scale, with one product by S for value and gradient together."""
    scale = target.scale + torch.finfo(torch.float64).tiny

    def loss(kernels: list[Tensor]) -> Tensor:
        kernel = compose(kernels, stages).flatten(1)
        with torch.no_grad():
            square = kernel @ target.covariance
            slope = square - target.response
            value = ((slope - target.response) * kernel).sum()
        # <W, S W> - 2 <W, R> has the gradient 2 (W S - R): the second factor is a constant here.
        product = 2 * (kernel * slope).sum()
        return 1 + (product - product.detach() + value) / scale

    return loss
