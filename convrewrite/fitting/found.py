"""What a fit found: stage kernels, the bias that goes with them, and the errors they leave."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.fitting.moments import Moments
from convrewrite.fitting.trust import Trust
from convrewrite.structures import Stage, compose, join_groups, split_groups


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
        unexplained=_pooled(held_out, composed),
    )


def left_unexplained(kernel: Tensor, moments: Sequence[Moments]) -> float:
    """The share of the variance of all groups' outputs that a canonical kernel leaves unexplained."""
    return _pooled(moments, split_groups(kernel.double(), len(moments)))


def _pooled(moments: Sequence[Moments], kernels: Sequence[Tensor]) -> float:
    """The share of the variance of all groups' outputs that is left unexplained: each counts by its output's variance."""
    weights = [float(m.var_y.sum()) for m in moments]
    shares = [m.unexplained(k) for m, k in zip(moments, kernels, strict=True)]
    total = sum(weights)
    return sum(w * s for w, s in zip(weights, shares, strict=True)) / total if total > 0 else 0.0
