"""How far few inputs are trusted: from fully, through ridges and a shrunk covariance, to not at all (the weights alone).

With few positions per unknown the moments describe the inputs they were gathered from better than any others: a fit then does
better on these than on held-out ones, an *overfit*. Where that is seen, the same option is fitted with less trust in the data,
and the fit that does best on the held-out inputs is taken. Where there are many positions, or no gap is seen, nothing changes.
"""

from dataclasses import dataclass

import torch

from convrewrite.fitting.moments import Moments
from convrewrite.fitting.squares import STRIP
from convrewrite.fitting.targets import MANY_POSITIONS, RIDGE

GAP = 1.05
"""Less trust is tried if the error on held-out inputs is more than this many times that on the inputs fitted on: even two halves
of the same inputs differ by a few percent."""

NEGLIGIBLE = 1e-6
"""A fit that leaves at most this share of a variance unexplained, an error of a thousandth, is good enough as it is."""

RIDGES = (1e-2, 1e-1, 1.0)
"""Pulls towards the original kernel that are tried, as parts of the mean variance of a patch, a decade apart: from ten times the
usual one up to one as strong as the inputs themselves. The error has a flat minimum over them, so that finer steps gain
nothing."""


@dataclass(frozen=True, slots=True)
class Trust:
    """How far the data is trusted: the ``ridge`` towards the original kernel, a part of the mean variance of a patch; and the
    ``shrinkage`` of the covariance towards its diagonal, 0 to 1, None: little, depending on the positions alone."""

    ridge: float = RIDGE
    shrinkage: float | None = None


FULL = Trust()
"""The trust that many inputs get, and with which everything is fitted first."""


def doubtable(count: int, unknowns: int) -> bool:
    """Whether positions are so few that a fit to them may be an overfit."""
    return count < MANY_POSITIONS * unknowns


def doubtful(count: int, unknowns: int, seen: float, unseen: float) -> bool:
    """Whether a fit to ``count`` positions may be an overfit: these are few per unknown, and its error is larger on held-out
    inputs (``unseen``) than on its own (``seen``). Both are shares of the variance left unexplained."""
    return doubtable(count, unknowns) and unseen > max(NEGLIGIBLE, GAP**2 * seen)


def lesser_trusts(moments: Moments, examples: int) -> tuple[Trust, ...]:
    """The trusts that are tried where a fit is doubtful. The positions of one example are much alike, so besides the ridges,
    which leave the covariance nearly as it is, a shrinkage is tried that counts ``examples`` as the samples."""
    return (*(Trust(ridge) for ridge in RIDGES), Trust(shrinkage=shrinkage_of(moments, examples)))


def shrinkage_of(moments: Moments, count: int) -> float:
    """The share, 0 to 1, by which a covariance of ``count`` independent samples is best drawn towards its diagonal.

    The oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero: Shrinkage Algorithms for MMSE Covariance Estimation, IEEE
    Transactions on Signal Processing 58, 2010, equation 23), which needs only the traces of S and of its square. It is written
    for a multiple of the identity as the target, so it is applied to the correlations, whose diagonal is one. Elements that never
    vary are left out.
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
