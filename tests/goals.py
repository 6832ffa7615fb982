"""What fits go towards, from moments alone."""

from collections.abc import Sequence

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting import Goal, Moments
from convrewrite.fitting.stages import grounds_of


def goals_of(kernel: Tensor, spec: ConvSpec, moments: Sequence[Moments]) -> list[Goal]:
    """Those of every group of a canonical kernel, whose inputs are believed and whose outputs count alike."""
    return [Goal.of(ground.target()) for ground in grounds_of(kernel, spec, moments)]
