"""What makes a tensor from a few numbers."""

import math
from typing import Any

import torch
from torch import Tensor

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.arithmetic import DTYPES
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker, Numbers, ints, made, number

HALVES = (torch.float16, torch.bfloat16)
"""Types that are computed in single precision."""


def sequence(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """From start by steps of delta, without the limit."""
    count = max(0, math.ceil((number(limit) - number(start)) / number(delta)))
    return start + delta * torch.arange(count, device=start.device).to(start.dtype)


def filled(shape: Numbers, *, value: Any, dtype: torch.dtype) -> Tensor:
    """The same number everywhere."""
    return torch.full(ints(shape), value, dtype=dtype)


def eye_like(x: Tensor, *, k: int, dtype: torch.dtype | None) -> Tensor:
    """Ones on the ``k``-th diagonal, in the type of ``x`` where none is given."""
    return torch.ones(x.shape, dtype=torch.int32, device=x.device).triu(k).tril(k).to(dtype or x.dtype)


def one_hot(indices: Tensor, depth: Numbers, values: Tensor, *, axis: int) -> Tensor:
    """The second value at the index, the first elsewhere; for an index out of range, the first value everywhere."""
    count = ints(depth)[0]
    axis = axis % (indices.dim() + 1)
    wanted = indices.long()
    wanted = torch.where(wanted < 0, wanted + count, wanted).unsqueeze(axis)
    classes = torch.arange(count, device=indices.device).reshape(-1, *[1] * (indices.dim() - axis))
    return torch.where(wanted == classes, values[1], values[0])


def make_filled(view: NodeView) -> Made | None:
    """Without a value, zeros in single precision."""
    value = torch.as_tensor(view.attributes.get("value", 0.0))
    dtype = torch.float32 if value.dtype in HALVES else value.dtype
    return Computed(filled, view, {"value": number(value.reshape(-1)), "dtype": dtype}, plain=(0,))


def make_eye_like(view: NodeView) -> Made | None:
    """None for types in which nothing is computed here."""
    wanted = view.attributes.get("dtype")
    if wanted is not None and wanted not in DTYPES:
        return None
    keywords = {"k": view.attributes.get("k", 0), "dtype": None if wanted is None else DTYPES[wanted]}
    return Computed(eye_like, view, keywords)


FILLING: dict[str, Maker] = {
    "Range": made(sequence),
    "ConstantOfShape": make_filled,
    "EyeLike": make_eye_like,
    "OneHot": made(one_hot, plain=(1,), axis=-1),
}
"""Operators that make new numbers -> their makers."""
