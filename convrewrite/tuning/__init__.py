"""Train a rewritten model towards the original, without labels. Knows no rule and no plan."""

from convrewrite.tuning.callers_code import code_of
from convrewrite.tuning.checkpoint import Checkpoint, fingerprint, require_place
from convrewrite.tuning.distilling import Distilled, Training
from convrewrite.tuning.examples import Augment
from convrewrite.tuning.pace import Pace
from convrewrite.tuning.processes import Processes, accelerated, joins_others
from convrewrite.tuning.refining import Refined, Refinement, refine
from convrewrite.tuning.resuming import resumed
from convrewrite.tuning.tasks import TrainingInputs, keeps_outputs, task_of
from convrewrite.tuning.trainable import rewritten_parameters

__all__ = [
    "Augment",
    "Checkpoint",
    "Distilled",
    "Pace",
    "Processes",
    "Refined",
    "Refinement",
    "Training",
    "TrainingInputs",
    "accelerated",
    "code_of",
    "fingerprint",
    "joins_others",
    "keeps_outputs",
    "refine",
    "require_place",
    "resumed",
    "rewritten_parameters",
    "task_of",
]
