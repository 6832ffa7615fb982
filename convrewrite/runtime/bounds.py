"""Bounds of ``clamp`` in the form in which torch exports them to ONNX."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

CLAMPS = ("clamp", "clamp_", "clip", "clip_")


class BoundsOfOneKind(TorchFunctionMode):
    """``x.clamp(0, 0.5)`` becomes ``x.clamp(0.0, 0.5)``, which computes the same: torch's exporter to ONNX makes a tensor of the
    whole number alone, and then finds no operator that takes a tensor beside a number."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function."""
        named = dict(kwargs or {})
        name, _, _ = getattr(func, "__name__", "").partition(".")  # that of an operator ends in its overload
        if name in CLAMPS and {int, float} <= {type(value) for value in (*args, *named.values())}:
            args = tuple(_as_float(value) for value in args)
            named = {key: _as_float(value) for key, value in named.items()}
        return func(*args, **named)


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value
