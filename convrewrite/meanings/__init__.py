"""What each output of a model means, and how near two models' outputs are."""

from convrewrite.meanings.evaluation import Evaluation
from convrewrite.meanings.fidelity import (
    MOST_UNEXPLAINED,
    Fidelity,
    OutputFidelity,
    RunningFidelity,
    effect_of,
    require_same_outputs,
)
from convrewrite.meanings.kinds import (
    NOTHING,
    Meaning,
    OutputKind,
    WantedOutputs,
    asked_meanings,
    outputs_and_origins,
    read,
    require_outputs,
    tell,
)
from convrewrite.meanings.origins import Origin
from convrewrite.meanings.rounding import rounding_of
from convrewrite.meanings.variation import Variation, along_axis

__all__ = [
    "MOST_UNEXPLAINED",
    "NOTHING",
    "Evaluation",
    "Fidelity",
    "Meaning",
    "Origin",
    "OutputFidelity",
    "OutputKind",
    "RunningFidelity",
    "Variation",
    "WantedOutputs",
    "along_axis",
    "asked_meanings",
    "effect_of",
    "outputs_and_origins",
    "read",
    "require_outputs",
    "require_same_outputs",
    "rounding_of",
    "tell",
]
