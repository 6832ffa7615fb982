"""What fits go towards, and what whole kernels leave, from moments alone."""

from collections.abc import Sequence

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting import Goal, Moments, found
from convrewrite.fitting.stages import grounds_of
from convrewrite.structures import Stage


def goals_of(kernel: Tensor, spec: ConvSpec, moments: Sequence[Moments]) -> list[Goal]:
    """Those of every group of a canonical kernel, whose inputs are believed and whose outputs count alike."""
    return [Goal.of(ground.target()) for ground in grounds_of(kernel, spec, moments)]


def unexplained(kernel: Tensor, moments: Moments) -> float:
    """The share of the variance of a group's output that its whole kernel leaves unexplained."""
    return found.unexplained((kernel,), (_whole(kernel),), moments)


def bias_of(kernel: Tensor, moments: Moments) -> Tensor:
    """The best bias beside a group's whole kernel."""
    return found.bias_of((kernel.double(),), (_whole(kernel),), moments)


def _whole(kernel: Tensor) -> Stage:
    return Stage(kernel.shape[1], len(kernel), "hw")
