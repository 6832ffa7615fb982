"""How far inputs are believed that are few: from what they say alone, over ridges and a shrunk covariance, to the weights alone.

With few positions per unknown the moments know the inputs they were gathered from better than any others: a fit then does
better on these than on held-out ones, an *overfit*. Where that is seen, the same option is fitted with less trust in the
data, and what does best on the held-out inputs stands. Where there are many positions, or no gap is seen, nothing changes.
"""

from dataclasses import dataclass

import torch

from convrewrite.fitting.moments import Moments
from convrewrite.fitting.squares import STRIP
from convrewrite.fitting.targets import MANY_POSITIONS, RIDGE

GAP = 1.05
"""Error on held-out inputs over that on the inputs fitted on, beyond which less trust is tried: two halves of the same inputs
differ by a few percent already."""

NEGLIGIBLE = 1e-6
"""Share of a variance left unexplained, an error of a thousandth, up to which a fit is good enough as it is."""

RIDGES = (1e-2, 1e-1, 1.0)
"""Pulls towards the original kernel that are tried, as parts of the mean variance of a patch, a decade apart: from ten times the
usual one up to one as strong as the inputs themselves. The error has a flat minimum over them, so that finer steps gain
nothing."""


@dataclass(frozen=True, slots=True)
class Trust:
    """One way to believe the data: the ``ridge`` towards the original kernel, a part of the mean variance of a patch; and the
    ``shrinkage`` of the covariance towards its diagonal, 0 to 1, None: little, by the positions alone."""

    ridge: float = RIDGE
    shrinkage: float | None = None


FULL = Trust()
"""Trust that many inputs get: the one that everything is fitted with first."""


def doubtable(count: int, unknowns: int) -> bool:
    """Whether positions are so few that a fit to them may have learned its inputs by heart."""
    return count < MANY_POSITIONS * unknowns


def doubtful(count: int, unknowns: int, seen: float, unseen: float) -> bool:
    """Whether a fit to ``count`` positions may have learned its inputs by heart: few per unknown, and a larger error ``unseen``
    on held-out inputs than ``seen``, on its own. Both are shares of the variance left unexplained."""
    return doubtable(count, unknowns) and unseen > max(NEGLIGIBLE, GAP**2 * seen)


def lesser_trusts(moments: Moments, examples: int) -> tuple[Trust, ...]:
    """What is tried where a fit is doubtful. The positions of one example tell much the same, so that a shrinkage that counts
    ``examples`` stands beside the ridges, which leave the covariance nearly as it is."""
    return (*(Trust(ridge) for ridge in RIDGES), Trust(shrinkage=shrinkage_of(moments, examples)))


def shrinkage_of(moments: Moments, count: int) -> float:
    """The share, 0 to 1, by which a covariance of ``count`` independent samples is best drawn towards its diagonal.

    The oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero: Shrinkage Algorithms for MMSE Covariance Estimation, IEEE
    Transactions on Signal Processing 58, 2010, equation 23), which needs nothing but the traces of S and of its square. It is
    written for a multiple of the identity as the target, so it is applied to the correlations, whose diagonal is one. Elements
    that never vary are left out.
    """
    variances = moments.cov_p.diagonal()
    alive = variances > 0
    size = int(alive.sum())
    if size < 2:
        return 0.0
    inverse = torch.where(alive, 1 / variances.clamp_min(torch.finfo(variances.dtype).tiny), 0)
    # The sum of all squared correlations, without a second matrix of that size.
    rows = moments.cov_p.split(STRIP)
    square = sum(float(strip.square() @ inverse @ part) for strip, part in zip(rows, inverse.split(STRIP), strict=True))
    excess = square - size
    if excess <= 0:
        return 1.0
    wanted = (1 - 2 / size) * square + size**2
    return min(1.0, max(0.0, wanted / ((count + 1 - 2 / size) * excess)))
