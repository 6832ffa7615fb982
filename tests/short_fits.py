"""Fits in few iterations: their number makes a result better, not another, and takes most of a run on a small network."""

from collections.abc import Callable
from functools import wraps

from torch import Tensor

ITERATIONS = 5
"""Of L-BFGS, at most: enough for a line search, a history and a second direction."""

Minimise = Callable[..., list[Tensor]]


def short_fits(minimise: Minimise) -> Minimise:
    """What stands in place of :func:`convrewrite.fitting.stages._minimise`."""

    @wraps(minimise)
    def short(loss: object, assemble: object, start: object, iterations: int) -> list[Tensor]:
        return minimise(loss, assemble, start, min(iterations, ITERATIONS))

    return short
