"""``weight.data`` in a forward that torch exports: networks that bound the norm of their kernels write it before every call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

DATA = torch._C.TensorBase.data
"""The attribute, whose functions are its ``__get__`` and ``__set__``."""


class WrittenData(TorchFunctionMode):
    """``weight.data = torch.renorm(weight.data, ...)`` leaves a weight without numbers as it is, and what is read of it is in the
    graph: torch's exporter loses track of either and, where it then tries in another way, ends the process. Exported is what a
    run before has written, which a network that writes the same again computes with; another one fails its parity."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function."""
        if getattr(func, "__self__", None) is DATA and isinstance(args[0], FakeTensor):
            return args[0].detach() if func.__name__ == "__get__" else None
        return func(*args, **(kwargs or {}))
