"""What a fit found: stage kernels, the bias that goes with them, and the errors they leave."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.fitting.moments import Moments
from convrewrite.fitting.objective import LastInput
from convrewrite.fitting.trust import Trust
from convrewrite.structures import Stage, compose, join_groups


@dataclass(frozen=True, slots=True)
class Fit:
    """Stage kernels and bias of one site (float64, groups joined), and the share of its output's variance on held-out inputs
    that they leave unexplained: the square of the relative error. Without inputs, of the kernel's energy.

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


def told(
    fitted: Sequence[tuple[Tensor, ...]],
    stages: Sequence[Stage],
    moments: Sequence[Moments],
    held_out: Sequence[Moments],
) -> Fit:
    """The stage kernels of every group joined, with the bias that goes with them, and what they leave unexplained."""
    composed = [compose(kernels, stages) for kernels in fitted]
    return Fit(
        kernels=join_groups(fitted),
        bias=torch.cat([m.bias(k) for m, k in zip(moments, composed, strict=True)]),
        unexplained=left_unexplained(fitted, stages, held_out),
    )


def left_unexplained(
    fitted: Sequence[tuple[Tensor, ...]], stages: Sequence[Stage], moments: Sequence[Moments]
) -> float:
    """The share of the variance of all groups' outputs that stage kernels leave unexplained: each group counts by its output's
    variance."""
    weights = [float(m.var_y.sum()) for m in moments]
    shares = [unexplained(kernels, stages, m) for kernels, m in zip(fitted, moments, strict=True)]
    total = sum(weights)
    return sum(w * s for w, s in zip(weights, shares, strict=True)) / total if total > 0 else 0.0


def unexplained(kernels: tuple[Tensor, ...], stages: Sequence[Stage], moments: Moments) -> float:
    """The share of the variance of one group's output that stage kernels leave unexplained: :meth:`Moments.unexplained` of what
    they compose to, with products by the covariance that are as few as the rank."""
    exact = tuple(kernel.double() for kernel in kernels)
    seen = LastInput.of(exact[:-1], stages, _Seen.of(moments, compose(exact, stages)))
    total = moments.var_y.sum()
    residual = max(0.0, seen.objective(exact[-1], float(total)))
    return residual / float(total.clamp_min(torch.finfo(total.dtype).tiny))


@dataclass(frozen=True, slots=True)
class _Seen:
    """Moments as they were gathered."""

    covariance: Tensor
    response: Tensor
    shape: tuple[int, int, int, int]

    @classmethod
    def of(cls, moments: Moments, kernel: Tensor) -> "_Seen":
        outputs, channels, height, width = kernel.shape
        return cls(moments.cov_p, moments.cov_yp, (outputs, channels, height, width))
