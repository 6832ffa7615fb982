"""What rounding to bfloat16 alone does to a model's outputs: a training in bfloat16 must have far more than that to gain."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from convrewrite.errors import ConvRewriteError
from convrewrite.inputs import Inputs
from convrewrite.meanings.fidelity import effect_of
from convrewrite.meanings.kinds import Meaning
from convrewrite.modules import named_outputs, run
from convrewrite.precision import bfloat16_pays, in_bfloat16


def rounding_of(
    model: nn.Module, pairs: Sequence[tuple[Inputs, Mapping[str, Tensor]]], meanings: Mapping[str, Meaning]
) -> float:
    """The effect of running a model in bfloat16, in the unit of every effect; ``pairs`` are inputs and the outputs that it gives
    for them otherwise. Infinite where it does not run in bfloat16, or is no faster."""
    if not bfloat16_pays(model):
        return math.inf
    try:
        with in_bfloat16():
            effect = effect_of(((wanted, named_outputs(run(model, inputs))) for inputs, wanted in pairs), meanings)
    except (RuntimeError, ConvRewriteError):  # an operator that takes no bfloat16, or two types that do not go together
        return math.inf
    return effect if math.isfinite(effect) else math.inf
