"""Numbers to small whole ones and back, as in quantised networks; like rounding, this gives no gradient."""

import torch
from torch import Tensor

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker


def quantise(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int) -> Tensor:
    """Rounded to multiples of ``scale``, ties to the even one, and counted from ``zero``; without that, from 0 up to 255."""
    dtype = torch.uint8 if zero is None else zero.dtype
    limits = torch.iinfo(dtype)
    counted = torch.round(x / _along(scale, axis, x))
    shifted = counted if zero is None else counted + _along(zero, axis, x)
    return shifted.clamp(limits.min, limits.max).to(dtype)


def dequantise(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int) -> Tensor:
    """Multiples of ``scale``, counted from ``zero``."""
    counted = x if zero is None else x.to(torch.int32) - _along(zero, axis, x).to(torch.int32)
    return counted.to(scale.dtype) * _along(scale, axis, x)


def _along(values: Tensor, axis: int, x: Tensor) -> Tensor:
    """One value for all, or one for each place along an axis."""
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape(-1, *[1] * (x.dim() - 1 - axis % x.dim()))


def make_quantise(view: NodeView) -> Made | None:
    """None where a scale serves a block of numbers, and where the type is stated in another way than by the zero point."""
    special = any(view.attributes.get(name) for name in ("block_size", "output_dtype", "precision"))
    return None if special or not _per_tensor_or_axis(view) else Computed(quantise, view, _axis(view))


def make_dequantise(view: NodeView) -> Made | None:
    """None where a scale serves a block of numbers, and where another type is wanted than that of the scale."""
    special = any(view.attributes.get(name) for name in ("block_size", "output_dtype"))
    return None if special or not _per_tensor_or_axis(view) else Computed(dequantise, view, _axis(view))


def _per_tensor_or_axis(view: NodeView) -> bool:
    return view.ranks[1] in (0, 1)


def _axis(view: NodeView) -> dict[str, int]:
    return {"axis": view.attributes.get("axis", 1)}


QUANTISATION: dict[str, Maker] = {"QuantizeLinear": make_quantise, "DequantizeLinear": make_dequantise}
"""Operators that quantise -> their makers."""
