"""Train a rewritten model towards the original, without labels. Knows no rule and no plan."""

from convrewrite.tuning.blocks import joins, observed
from convrewrite.tuning.composition import composed
from convrewrite.tuning.losses import Distillation, mean_square, output_loss, relative_loss
from convrewrite.tuning.refining import WORTH, Recipe, Refined, Refinement, refine
from convrewrite.tuning.trainable import every_parameter, numbers_of, put_numbers, rewritten_parameters, training

__all__ = [
    "WORTH",
    "Distillation",
    "Recipe",
    "Refined",
    "Refinement",
    "composed",
    "every_parameter",
    "joins",
    "mean_square",
    "numbers_of",
    "observed",
    "output_loss",
    "put_numbers",
    "refine",
    "relative_loss",
    "rewritten_parameters",
    "training",
]
