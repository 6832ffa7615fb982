"""The mathematics of one convolution: moments of its inputs, and stages fitted to them. Knows no model, no budget."""

from convrewrite.fitting.found import Fit, left_unexplained, told
from convrewrite.fitting.moments import (
    Accumulator,
    Block,
    Moments,
    position_limit,
    row_bytes,
    square_bytes,
    with_wanted_outputs,
)
from convrewrite.fitting.stages import (
    LARGE,
    MIN_ITERATIONS,
    Roots,
    effort_for,
    effort_within,
    fit,
    refit,
    rough_fit,
    targets_of,
)
from convrewrite.fitting.targets import ENOUGH_POSITIONS, Target, solving
from convrewrite.fitting.trust import FULL, Trust, doubtful, lesser_trusts

__all__ = [
    "ENOUGH_POSITIONS",
    "FULL",
    "LARGE",
    "MIN_ITERATIONS",
    "Accumulator",
    "Block",
    "Fit",
    "Moments",
    "Roots",
    "Target",
    "Trust",
    "doubtful",
    "effort_for",
    "effort_within",
    "fit",
    "left_unexplained",
    "lesser_trusts",
    "position_limit",
    "refit",
    "rough_fit",
    "row_bytes",
    "solving",
    "square_bytes",
    "targets_of",
    "told",
    "with_wanted_outputs",
]
