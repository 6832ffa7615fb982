"""The factor of losses whose gradients are computed in float16, where most gradients of a mean over many numbers are zero.

Source: Micikevicius et al. 2018, "Mixed precision training", with a factor that follows from the gradients.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from convrewrite.state import parameters_of

LARGEST, PART = 65_536.0, 4.0
"""The factor to begin with, that of torch's ``GradScaler``, and the part of it that is taken where gradients overflow."""

Loss = TypeVar("Loss")


class Scale:
    """``factor``: what a loss is multiplied by before its gradients are computed; 1 for a model without float16."""

    def __init__(self, model: nn.Module) -> None:
        """For the model that is trained."""
        self._half = any(parameter.dtype == torch.float16 for parameter in parameters_of(model))
        self.factor = 1.0
        self.begin()

    def begin(self) -> None:
        """Take the largest factor again: where a checkpoint is written, so that who goes on from there takes the same steps."""
        self.factor = LARGEST if self._half else 1.0

    def differentiated(self, parameters: Sequence[Tensor], backwards: Callable[[float], Loss]) -> Loss:
        """The loss that ``backwards`` returns, which adds the gradients of the factor times that loss: once more, with a smaller
        factor, as long as a gradient is not finite."""
        while True:
            for parameter in parameters:
                parameter.grad = None
            loss = backwards(self.factor)
            if self.factor == 1.0 or all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters):
                return loss
            self.factor /= PART
