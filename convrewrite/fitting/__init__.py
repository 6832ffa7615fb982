"""The mathematics of one convolution: moments of its inputs, and stages fitted to them. Knows no model, no budget."""

from convrewrite.fitting.few_inputs import Evidence
from convrewrite.fitting.found import Fit
from convrewrite.fitting.goals import Goal, Roots
from convrewrite.fitting.moments import (
    Accumulator,
    Block,
    MomentBytes,
    Moments,
    position_limit,
    with_wanted_outputs,
)
from convrewrite.fitting.squares import summed_squares
from convrewrite.fitting.stages import effort_within, fit, refit, rough_fit
from convrewrite.fitting.targets import ENOUGH_POSITIONS, LARGE, Ground, solving
from convrewrite.fitting.trust import doubtable

__all__ = [
    "ENOUGH_POSITIONS",
    "LARGE",
    "Accumulator",
    "Block",
    "Evidence",
    "Fit",
    "Goal",
    "Ground",
    "MomentBytes",
    "Moments",
    "Roots",
    "doubtable",
    "effort_within",
    "fit",
    "position_limit",
    "refit",
    "rough_fit",
    "solving",
    "summed_squares",
    "with_wanted_outputs",
]
