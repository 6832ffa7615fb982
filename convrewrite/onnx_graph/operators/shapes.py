"""What changes the shape of a tensor, or asks for it; shapes are whole numbers on the CPU, known when they are computed."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import (
    Computed,
    Made,
    Maker,
    Numbers,
    constant,
    dynamic,
    ints,
    made,
    moved,
)


def shape_of(x: Tensor, *, start: int, end: int | None) -> Tensor:
    """The sizes of the axes from ``start`` to ``end``."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def size_of(x: Tensor) -> Tensor:
    """How many numbers there are."""
    return torch.tensor(x.numel(), dtype=torch.int64)


def reshape(x: Tensor, shape: Numbers, *, allowzero: int) -> Tensor:
    """A zero stands for the size of the same axis, unless ``allowzero``; -1 for what remains."""
    sizes = ints(shape)
    if not allowzero:
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(x: Tensor, *, axis: int) -> Tensor:
    """A matrix: the axes before ``axis`` are its rows."""
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(x: Tensor, *, perm: list[int] | None) -> Tensor:
    """The axes in the order ``perm`` or, without it, reversed."""
    return x.permute(list(reversed(range(x.dim()))) if perm is None else perm)


def squeeze(x: Tensor, axes: Numbers | None = None) -> Tensor:
    """Without these axes of size 1, or without all of them."""
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    """With these axes of size 1, counted in the result."""
    positions = ints(axes)
    rank = x.dim() + len(positions)
    for axis in sorted(axis % rank for axis in positions):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: Numbers) -> Tensor:
    """Broadcast against a shape, which may be the smaller one."""
    return x.expand(torch.broadcast_shapes(x.shape, ints(shape)))


def tile(x: Tensor, repeats: Numbers) -> Tensor:
    """Repeated along every axis."""
    return x.repeat(ints(repeats))


def concat(*values: Tensor, axis: int) -> Tensor:
    """One behind the other."""
    return torch.cat(values, axis)


def split(x: Tensor, sizes: Numbers | None = None, *, axis: int, parts: int) -> tuple[Tensor, ...]:
    """Into parts of these sizes, or equal ones of which the last may be smaller."""
    if sizes is not None:
        return x.split(ints(sizes), axis)
    length = x.shape[axis]
    part = -(-length // parts)
    return x.split([part] * (parts - 1) + [length - part * (parts - 1)], axis)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str) -> Tensor:
    """Channels become a block of places; depth first (DCR) has the block's place in the leading channels."""
    n, c, h, w = x.shape
    b, rest = blocksize, c // blocksize**2
    if mode == "DCR":
        blocks = x.reshape(n, b, b, rest, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(n, rest, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, rest, h * b, w * b)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str) -> Tensor:
    """A block of places becomes channels; the inverse of :func:`depth_to_space`."""
    n, c, h, w = x.shape
    b = blocksize
    blocks = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.permute(order).reshape(n, c * b * b, h // b, w // b)


def dropout(
    x: Tensor,
    ratio: Any = None,  # noqa: ARG001
    training: Any = None,  # noqa: ARG001
    *,
    kept: bool,
    numbers: bool,
) -> tuple[Tensor, Tensor]:
    """Outside of training nothing is dropped: the values, and a mask that is ``kept`` everywhere, as ``numbers`` or booleans."""
    return x, torch.full_like(x, kept, dtype=x.dtype if numbers else torch.bool)


def make_identity(view: NodeView) -> Made | None:
    """The module that every pass over a graph knows to do nothing."""
    return nn.Identity() if view.outputs == (True,) else None


def make_dropout(view: NodeView) -> Made | None:
    """None where it may drop something. Since version 12 the mask marks what stays; before, onnxruntime marks nothing in it where
    nothing is dropped, and in versions below 10 it has the type of the values."""
    training = constant(view, 2)
    if dynamic(view, 2) or (training is not None and bool(training)):
        return None
    if len(view.outputs) == 1 and not dynamic(view, 1):
        return nn.Identity()
    return Computed(dropout, view, {"kept": view.opset >= 12, "numbers": view.opset < 10})


def make_split(view: NodeView) -> Made | None:
    """Without sizes there are as many parts as outputs."""
    return Computed(split, view, {"axis": view.attributes.get("axis", 0), "parts": len(view.outputs)}, plain=(1,))


SHAPES: dict[str, Maker] = {
    "Shape": made(shape_of, start=0, end=None),
    "Size": made(size_of),
    "Reshape": made(reshape, plain=(1,), allowzero=0),
    "Flatten": made(flatten, axis=1),
    "Transpose": made(transpose, perm=None),
    "Squeeze": moved(13, made(squeeze, plain=(1,)), axes=1),
    "Unsqueeze": moved(13, made(unsqueeze, plain=(1,)), axes=1),
    "Expand": made(expand, plain=(1,)),
    "Tile": made(tile, plain=(1,)),
    "Concat": made(concat, axis=0),
    "Split": moved(13, make_split, split=1),
    "DepthToSpace": made(depth_to_space, blocksize=1, mode="DCR"),
    "SpaceToDepth": made(space_to_depth, blocksize=1, mode="DCR"),
    "Identity": make_identity,
    "Dropout": make_dropout,
}
"""Operators that only move numbers from one shape to another -> their makers."""
