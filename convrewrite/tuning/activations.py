"""The outputs of a model's activation functions during a run.

Features are compared after their activation, where only what the rest of the model uses is left of them: an error in a value that
a ReLU turns to zero does not matter. Functions are recorded in the order in which they are called, since a rewritten model calls
the same ones as its original, whether as modules or not, and whatever lies between them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

FUNCTIONS = frozenset(
    {
        "celu", "elu", "elu_", "gelu", "hardswish", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "mish", "prelu",
        "relu", "relu_", "relu6", "selu", "silu",
    }
)  # fmt: skip
"""Names of torch's functions that are activations between layers; gates, such as a sigmoid, do not count."""


class Activations(TorchFunctionMode):
    """Within the block, ``seen`` collects the outputs of activation functions, by their place in the order of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function and records its output; functions that it calls itself are not recorded."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in FUNCTIONS and isinstance(result, Tensor) and result.is_floating_point():
            self.seen[f"activation {len(self.seen)}"] = result
        return result


def comparable(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    """Whether two models called as many activation functions, on tensors of the same shapes."""
    return [value.shape for value in wanted.values()] == [value.shape for value in found.values()]
