"""The result of a fit: stage kernels, the bias that goes with them, and the errors they leave."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.fitting.moments import Moments
from convrewrite.fitting.objective import LastInput
from convrewrite.fitting.targets import Second, Shape
from convrewrite.fitting.trust import Trust
from convrewrite.structures import Stage, join_groups, through


@dataclass(frozen=True, slots=True)
class Fit:
    """Stage kernels and bias of one site (float64, groups joined), and the share of its output's variance on held-out inputs that
    they leave unexplained: the square of the relative error. Without inputs, the share of the kernel's energy.

    ``trusts``: those of the groups, where they are less than full.
    """

    kernels: tuple[Tensor, ...]
    bias: Tensor
    unexplained: float
    trusts: tuple[Trust, ...] = ()

    @property
    def error(self) -> float:
        """The relative output error."""
        return self.unexplained**0.5


def fit_of(
    fitted: Sequence[tuple[Tensor, ...]],
    stages: Sequence[Stage],
    moments: Sequence[Moments],
    held_out: Sequence[Moments],
    shares: Sequence[float] | None = None,
) -> Fit:
    """The stage kernels of every group joined, with the bias that goes with them, and what they leave unexplained. ``shares``:
    what every group leaves unexplained, where it is known."""
    left = left_unexplained(fitted, stages, held_out) if shares is None else pooled(shares, held_out)
    return Fit(
        kernels=join_groups(fitted),
        bias=torch.cat([bias_of(kernels, stages, m) for kernels, m in zip(fitted, moments, strict=True)]),
        unexplained=left,
    )


def bias_of(kernels: tuple[Tensor, ...], stages: Sequence[Stage], moments: Moments) -> Tensor:
    """``b' = E y - W' E p``, the best bias beside the kernel ``W'`` that the stage kernels of one group compose to."""
    mean = moments.mean_p.reshape(*shape_through(kernels, stages)[1:], 1)
    for stage, kernel in zip(stages, kernels, strict=True):
        mean = through(stage, kernel.to(mean), mean)
    return moments.mean_y - mean.flatten()


def shape_through(kernels: tuple[Tensor, ...], stages: Sequence[Stage]) -> Shape:
    """The shape of the kernel that stage kernels compose to: one of them has its full extent along each spatial axis."""
    height, width = (max(kernel.shape[axis] for kernel in kernels) for axis in (2, 3))
    return len(kernels[-1]), stages[0].in_channels, height, width


def left_unexplained(
    fitted: Sequence[tuple[Tensor, ...]], stages: Sequence[Stage], moments: Sequence[Moments]
) -> float:
    """The share of the variance of all groups' outputs that stage kernels leave unexplained."""
    shares = [unexplained(kernels, stages, m) for kernels, m in zip(fitted, moments, strict=True)]
    return pooled(shares, moments)


def unexplained(kernels: tuple[Tensor, ...], stages: Sequence[Stage], moments: Moments) -> float:
    """The share of the variance of one group's output that stage kernels leave unexplained: ``E |y - W' p - b'|^2`` over
    ``E |y - E y|^2`` for the kernel ``W'`` that they compose to with its best bias ``b'``, computed in only as many products by
    the covariance as the rank."""
    exact = tuple(kernel.double() for kernel in kernels)
    data = Second(moments.cov_p, moments.cov_yp, shape_through(exact, stages))
    return share_left(LastInput.of(exact[:-1], stages, data), exact[-1], moments)


def share_left(seen: LastInput, last: Tensor, moments: Moments) -> float:
    """The same, computed from what a last stage is solved from, for the last stage ``last``."""
    total = moments.var_y.sum()
    residual = max(0.0, seen.objective(last, float(total)))
    return residual / float(total.clamp_min(torch.finfo(total.dtype).tiny))


def pooled(shares: Sequence[float], moments: Sequence[Moments]) -> float:
    """The share that all groups together leave unexplained: each counts by its output's variance."""
    weights = [float(m.var_y.sum()) for m in moments]
    total = sum(weights)
    return sum(w * s for w, s in zip(weights, shares, strict=True)) / total if total > 0 else 0.0
