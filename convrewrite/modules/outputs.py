"""What a model gives when it is run: its outputs under stable names.

A forward may return a tensor, a tuple, a list, a dictionary, a dataclass, or any nesting of these. Everything that
compares or exports outputs first makes them a flat ``name -> tensor`` dictionary in one deterministic order.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from convrewrite.errors import TraceError
from convrewrite.leaves import as_real, leaves_of

ROOT = "output"

ROUNDING = 2**12
"""Units of rounding by which two ways of computing the same may differ."""

MOST = 1 / 16
"""Most by which they may differ, relative to the largest: in half precision as many units would let anything pass. Networks
with BatchNorm, of 16 to 100 layers, differed by up to 0.024 in float16 and 0.049 in bfloat16 with their sums in another order."""


class NamedOutputs(dict[str, Tensor]):
    """Outputs whose keys are their whole names, as an ONNX graph has them."""


def named_outputs(output: object) -> dict[str, Tensor]:
    """Flatten what a forward returned into ``name -> tensor``, in the order in which the model wrote it.

    One tensor is called ``output``; parts are named after their index, key or field: ``output.0``, ``output.logits``,
    ``output.aux.1``. Complex numbers are pairs of real ones, along a last axis, as ONNX files have them. ``None`` is skipped,
    and so is everything else that is no tensor: see :func:`left_out`.

    Raises TraceError if there is no tensor at all, for one that is not dense, or if two outputs get the same name.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in _named_leaves(output):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise TraceError(
                f"model output: expected dense tensors, found a {kind} one as {name!r}; return it as .to_dense(), or padded"
            )
        if name in named:
            raise TraceError(f"model output: two tensors are both named {name!r}; give them distinct keys")
        named[name] = as_real(tensor)
    if not named:
        raise TraceError(
            f"model output: expected at least one tensor, found {type(output).__name__} without any; "
            "return tensors, or tuples, lists, dictionaries or dataclasses of tensors; where it only wraps a network, as "
            "ultralytics' YOLO does with its .model, give that network"
        )
    return named


def left_out(output: object) -> tuple[str, ...]:
    """What :func:`named_outputs` skips, ``None`` aside, with its type: ``output.loss (float)``."""
    leaves = _named_leaves(output)
    return tuple(
        f"{name} ({type(value).__name__})"
        for name, value in leaves
        if value is not None and not isinstance(value, Tensor)
    )


def alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor], units: float = ROUNDING) -> bool:
    """Whether two runs gave the same outputs up to rounding: ``units`` of it, relative to the largest finite number, and never
    more than ``MOST``."""
    return first.keys() == second.keys() and all(_close(first[name], second[name], units) for name in first)


def _close(a: Tensor, b: Tensor, units: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.detach(), b.detach()
    finite = a[a.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    most = min(units * torch.finfo(a.dtype).eps, MOST)
    return torch.allclose(a, b, rtol=0.0, atol=most * scale, equal_nan=True)


def _named_leaves(output: object) -> Iterator[tuple[str, object]]:
    return iter(output.items()) if isinstance(output, NamedOutputs) else leaves_of(output, ROOT)
