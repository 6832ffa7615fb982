"""Functions of several values that broadcast against each other: arithmetic, comparisons, logic, types."""

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker, constant, dynamic, made, moved, number

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.BOOL: torch.bool,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
}
"""Types of ONNX -> those computed in: half precision is computed in single."""


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Whole numbers are rounded towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(base: Tensor, exponent: Any) -> Tensor:
    """In the type of the base, whatever that of the exponent."""
    whole = isinstance(exponent, int) or (isinstance(exponent, Tensor) and not exponent.is_floating_point())
    if not base.is_floating_point() and not whole:
        return torch.pow(base.double(), exponent).to(base.dtype)
    return torch.pow(base, exponent).to(base.dtype)


def modulo(a: Tensor, b: Tensor, *, fmod: int) -> Tensor:
    """The sign is that of the divisor, with ``fmod`` that of the dividend."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def add_all(*values: Tensor) -> Tensor:
    """The sum of all."""
    return reduce(torch.add, values)


def mean_of_all(*values: Tensor) -> Tensor:
    """The mean of all."""
    return add_all(*values) / len(values)


def largest(*values: Tensor) -> Tensor:
    """The largest of all."""
    return reduce(torch.maximum, values)


def smallest(*values: Tensor) -> Tensor:
    """The smallest of all."""
    return reduce(torch.minimum, values)


def clip(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Within bounds that may be missing; the upper one counts where the lower is above it."""
    if low is None and high is None:
        return x
    return torch.clamp(x, *(None if bound is None else number(bound) for bound in (low, high)))


def shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Bits moved to the LEFT or RIGHT."""
    return torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)


def cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The same numbers in another type."""
    return x.to(dtype)


def cast_like(x: Tensor, other: Tensor) -> Tensor:
    """The same numbers in the type of another tensor."""
    return x.to(other.dtype)


def joined(function: Callable[..., Any]) -> Maker:
    """A maker for sums: for two values that are no constants it gives the function by which the pipeline recognises a join."""

    def maker(view: NodeView) -> Made | None:
        if len(view.present) == 2 and dynamic(view, 0) and dynamic(view, 1) and len(view.outputs) == 1:
            return operator.add
        return Computed(function, view, {})

    return maker


def make_power(view: NodeView) -> Made | None:
    """A single constant exponent becomes a number, with which torch is faster and its gradient exact."""
    exponent = constant(view, 1)
    return Computed(power, view, {}, plain=(1,) if exponent is not None and exponent.dim() == 0 else ())


def make_cast(view: NodeView) -> Made | None:
    """None for types in which nothing is computed here: text, and numbers of 8 bits or less that are not whole bytes."""
    dtype = DTYPES.get(view.attributes["to"])
    return None if dtype is None else Computed(cast, view, {"dtype": dtype})


ARITHMETIC: dict[str, Maker] = {
    "Add": joined(torch.add),
    "Sum": joined(add_all),
    "Sub": made(torch.sub),
    "Mul": made(torch.mul),
    "Div": made(divide),
    "Pow": make_power,
    "Mod": made(modulo, fmod=0),
    "Max": made(largest),
    "Min": made(smallest),
    "Mean": made(mean_of_all),
    "Clip": moved(11, made(clip, plain=(1, 2)), min=1, max=2),
    "Where": made(torch.where),
    "Equal": made(torch.eq),
    "Greater": made(torch.gt),
    "GreaterOrEqual": made(torch.ge),
    "Less": made(torch.lt),
    "LessOrEqual": made(torch.le),
    "And": made(torch.logical_and),
    "Or": made(torch.logical_or),
    "Xor": made(torch.logical_xor),
    "BitwiseAnd": made(torch.bitwise_and),
    "BitwiseOr": made(torch.bitwise_or),
    "BitwiseXor": made(torch.bitwise_xor),
    "BitShift": made(shift, direction="LEFT"),
    "Cast": make_cast,
    "CastLike": made(cast_like),
}
"""Operators of several inputs that broadcast, and those that change the type -> their makers."""
