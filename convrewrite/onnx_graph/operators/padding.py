"""What puts numbers around a tensor, along any axis."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import (
    Computed,
    Made,
    Maker,
    Numbers,
    constant,
    ints,
    moved,
    number,
    taken,
)

MODES = ("constant", "reflect", "edge", "wrap")
"""Modes of padding that are computed here."""


def pad(x: Tensor, pads: Numbers, value: Any = None, axes: Numbers | None = None, *, mode: str) -> Tensor:
    """The pads are all begins, then all ends, of ``axes`` or of all axes; those below zero cut off."""
    around = [(0, 0)] * x.dim()
    amounts = ints(pads)
    along = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in ints(axes)]
    for axis, begin, end in zip(along, amounts[: len(along)], amounts[len(along) :], strict=True):
        around[axis] = (begin, end)
    if mode == "constant":
        return pad_constant(x, around, 0 if value is None else number(value))
    for axis, (begin, end) in enumerate(around):
        if begin or end:
            x = taken(x, axis, _sources(x.shape[axis], begin, end, mode))
    return x


def pad_constant(x: Tensor, around: list[tuple[int, int]], value: float) -> Tensor:
    """The begin and end of every axis, in the order of the axes; torch wants them last axis first."""
    return F.pad(x, [amount for pair in reversed(around) for amount in pair], value=value)


def _sources(size: int, begin: int, end: int, mode: str) -> Tensor:
    """For every place along an axis, the place that its number comes from."""
    places = torch.arange(-begin, size + end)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    period = max(2 * (size - 1), 1)
    places = places % period
    return torch.minimum(places, period - places) if size > 1 else torch.zeros_like(places)


def make_pad(view: NodeView) -> Made | None:
    """None for modes that are not known, and for pads that cut off in any mode but "constant"."""
    mode = view.attributes.get("mode", "constant")
    pads = constant(view, 1)
    cuts = pads is not None and pads.numel() > 0 and int(pads.min()) < 0
    if mode not in MODES or (cuts and mode != "constant"):
        return None
    return Computed(pad, view, {"mode": mode}, plain=(1, 2, 3))


PADDING: dict[str, Maker] = {"Pad": moved(11, make_pad, pads=1, value=2)}
"""The operator that pads -> its maker."""
