"""Where the axis of the channels lies after functions that only move numbers.

The head of a detector may be a convolution whose channels are split and permuted to the end, and that of a segmenter a linear
layer whose features are permuted to the front: the function alone does not tell the axis of the classes.
"""

import math
from collections.abc import Sequence
from typing import Any

MOVES = frozenset(
    {
        "alias", "as_strided", "cat", "chunk", "clone", "contiguous", "copy", "detach", "dropout", "expand", "flatten",
        "lift_fresh", "narrow", "native_dropout", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
        "squeeze", "stack", "t", "to", "to_copy", "transpose", "unbind", "unsafe_view", "unsqueeze",
        "upsample_bilinear2d",
        "upsample_nearest2d", "view", "zeros_like",
    }
)  # fmt: skip
"""Functions that compute nothing: of several tensors put together the first one counts."""

REGROUPING = frozenset({"flatten", "reshape", "squeeze", "unsafe_view", "view"})
LINEAR = ("addmm", "mm", "bmm", "baddbmm", "linear", "matmul")
CONVOLUTION = ("convolution", "conv2d", "conv1d", "mkldnn_convolution")


def axis_given(function: str, axes: int) -> int | None:
    """The axis of the channels that a function itself gives its result of so many axes; None for other functions."""
    if function in CONVOLUTION and axes > 2:
        return 1
    return axes - 1 if function in LINEAR else None


def axis_moved(
    function: str, args: Sequence[Any], axis: int, before: Sequence[int], after: Sequence[int]
) -> int | None:
    """Where an ``axis`` lies once one of :data:`MOVES` made a tensor of the shape ``after`` of one of the shape ``before``; None
    where it is not to be found any more."""
    axes, dim = len(before), args[1] if len(args) > 1 and isinstance(args[1], int) else 0
    if function == "permute":
        return [place % axes for place in args[1]].index(axis)
    if function == "transpose":
        swapped = {dim % axes: args[2] % axes, args[2] % axes: dim % axes}
        return swapped.get(axis, axis)
    if function == "t":
        return axes - 1 - axis
    if function in ("unsqueeze", "stack"):
        return axis + (dim % (axes + 1) <= axis)
    if function in ("select", "unbind"):
        return None if dim % axes == axis else axis - (dim % axes < axis)
    if function in REGROUPING:
        return _regrouped(axis, before, after)
    return axis if len(after) == axes and function != "as_strided" else None


def _regrouped(axis: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """The axis with as many numbers behind it. Of one that is split into several, the last has the classes: every anchor has
    all."""
    behind = math.prod(before[axis + 1 :])
    for place in reversed(range(len(after))):
        if after[place] > 1 and math.prod(after[place + 1 :]) == behind:
            return place if before[axis] % after[place] == 0 else None
    return None
