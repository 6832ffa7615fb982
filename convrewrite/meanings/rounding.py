"""What rounding to bfloat16 alone does to a model's outputs: what a training in it is to gain must be far above that."""

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
    """The effect of running a model in bfloat16, in the unit of every effect, by inputs and the outputs that it gives for them;
    infinite where it does not run so, or gains nothing by it."""
    if not bfloat16_pays(model):
        return math.inf
    try:
        with in_bfloat16():
            effect = effect_of(((wanted, named_outputs(run(model, inputs))) for inputs, wanted in pairs), meanings)
    except (RuntimeError, ConvRewriteError):  # an operator that takes no bfloat16, or two types that do not go together
        return math.inf
    return effect if math.isfinite(effect) else math.inf
