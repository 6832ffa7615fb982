"""What takes numbers from places, or puts them there; indices below zero count from the end."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker, Numbers, ints, made, moved, number, taken

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
"""How an update is combined with the number in its place: ONNX's word -> torch's."""

NO_END = (2**31 - 1, 2**63 - 1)
"""Ends of a slice that mean the last place or, with a step below zero, the first one."""


def slice_axes(
    x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> Tensor:
    """Slices along axes: begins and ends below zero count from the end of an axis, and those outside of it are moved onto it."""
    begins, stops = ints(starts), ints(ends)
    along = range(len(begins)) if axes is None else ints(axes)
    strides = [1] * len(begins) if steps is None else ints(steps)
    for axis, begin, stop, step in zip(along, begins, stops, strides, strict=True):
        places = _places(x.shape[axis], begin, stop, step)
        whole = x.narrow(axis, places.start, len(places)) if step == 1 else None
        x = taken(x, axis, torch.tensor(places, dtype=torch.int64)) if whole is None else whole
    return x


def _places(size: int, begin: int, stop: int, step: int) -> range:
    """The places of a slice; unlike in Python, a begin before the first place is the first one, even for a step below zero."""
    begin = min(max(begin + size if begin < 0 else begin, 0), size - 1 if step < 0 else size)
    if stop in NO_END:
        return range(begin, -1 if step < 0 else size, step)
    return range(begin, min(max(stop + size if stop < 0 else stop, -1 if step < 0 else 0), size), step)


def gather(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    """Slices along one axis; the axes of the indices take its place."""
    axis = axis % x.dim()
    slices = taken(x, axis, _from_start(indices.reshape(-1), x.shape[axis]))
    return slices.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def gather_elements(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    """The numbers at the places that the indices give along one axis."""
    return torch.gather(x, axis, _from_start(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int) -> Tensor:
    """The last axis of the indices says where, behind the batch axes that both share."""
    rank = indices.dim() - 1
    batch = [
        torch.arange(size, device=x.device).reshape([-1 if axis == i else 1 for axis in range(rank)])
        for i, size in enumerate(x.shape[:batch_dims])
    ]
    return x[(*batch, *indices.long().unbind(-1))]


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int, reduction: str) -> Tensor:
    """Every update at the place that its index gives along one axis."""
    return _put(x, axis, _from_start(indices, x.shape[axis]), updates, reduction)


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str) -> Tensor:
    """The last axis of the indices says where; what is left of the axes of ``x`` is put as a whole."""
    depth = indices.shape[-1]
    place = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for index, size in zip(indices.unbind(-1), x.shape[:depth], strict=True):
        place = place * size + _from_start(index, size)
    rows = x.reshape(math.prod(x.shape[:depth]), math.prod(x.shape[depth:]))
    places = place.reshape(-1, 1).expand(-1, rows.shape[1])
    return _put(rows, 0, places, updates.reshape(places.shape), reduction).reshape(x.shape)


def _put(x: Tensor, axis: int, places: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return torch.scatter(x, axis, places, updates)
    return torch.scatter_reduce(x, axis, places, updates, REDUCTIONS[reduction])


def _from_start(indices: Tensor, size: int) -> Tensor:
    """The same indices, all counted from the start."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def compress(x: Tensor, condition: Tensor, *, axis: int | None) -> Tensor:
    """The slices along an axis for which the condition holds or, without an axis, the numbers."""
    places = torch.nonzero(condition).reshape(-1)
    return x.reshape(-1)[places] if axis is None else x.index_select(axis, places)


def nonzero(x: Tensor) -> Tensor:
    """The places of what is not zero: one column per place."""
    return torch.nonzero(x).t()


def top_k(x: Tensor, k: Numbers, *, axis: int, largest: int) -> tuple[Tensor, Tensor]:
    """The first ``k`` in order; equal numbers stay in the order of their places."""
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = ints(k)[0]
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def arg_max(x: Tensor, *, axis: int, keepdims: int, select_last_index: int) -> Tensor:
    """Where the largest number is, the first of equal ones or the last."""
    if select_last_index:
        return x.shape[axis] - 1 - x.flip(axis).argmax(axis, bool(keepdims))
    return x.argmax(axis, bool(keepdims))


def arg_min(x: Tensor, *, axis: int, keepdims: int, select_last_index: int) -> Tensor:
    """Where the smallest number is, the first of equal ones or the last."""
    if select_last_index:
        return x.shape[axis] - 1 - x.flip(axis).argmin(axis, bool(keepdims))
    return x.argmin(axis, bool(keepdims))


def cum_sum(x: Tensor, axis: Numbers, *, exclusive: int, reverse: int) -> Tensor:
    """At every place the sum of all numbers up to it or, in ``reverse``, from it on; its own is left out when ``exclusive``."""
    return _cumulated(x, ints(axis)[0], bool(exclusive), bool(reverse), torch.cumsum)


def cum_prod(x: Tensor, axis: Numbers, *, exclusive: int, reverse: int) -> Tensor:
    """The product of the same numbers."""
    return _cumulated(x, ints(axis)[0], bool(exclusive), bool(reverse), torch.cumprod)


def _cumulated(x: Tensor, axis: int, exclusive: bool, reverse: bool, function: Callable[..., Tensor]) -> Tensor:
    ordered = x.flip(axis) if reverse else x
    if exclusive:
        nothing = torch.full_like(ordered.narrow(axis, 0, 1), 0 if function is torch.cumsum else 1)
        ordered = torch.cat([nothing, ordered.narrow(axis, 0, x.shape[axis] - 1)], axis)
    values = function(ordered, axis, dtype=x.dtype)
    return values.flip(axis) if reverse else values


def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int, time_axis: int) -> Tensor:
    """Every sequence with its first numbers, as many as its length, in reverse."""
    time = torch.arange(x.shape[time_axis], device=x.device).unsqueeze(1)
    places = torch.where(time < lengths, lengths - 1 - time, time)
    ordered = x.movedim((time_axis, batch_axis), (0, 1))
    places = places.reshape(*places.shape, *[1] * (x.dim() - 2)).expand(ordered.shape)
    return ordered.gather(0, places).movedim((0, 1), (time_axis, batch_axis))


def trilu(x: Tensor, k: Any = None, *, upper: int) -> Tensor:
    """The upper or lower triangle of matrices, from the ``k``-th diagonal."""
    diagonal = 0 if k is None else int(number(k))
    return x.triu(diagonal) if upper else x.tril(diagonal)


def make_top_k(view: NodeView) -> Made | None:
    """None where the order is left open."""
    if not view.attributes.get("sorted", 1):
        return None
    keywords = {name: view.attributes.get(name, default) for name, default in (("axis", -1), ("largest", 1))}
    return Computed(top_k, view, keywords, plain=(1,))


INDEXING: dict[str, Maker] = {
    "Slice": moved(10, made(slice_axes, plain=(1, 2, 3, 4)), starts=1, ends=2, axes=3),
    "Gather": made(gather, axis=0),
    "GatherElements": made(gather_elements, axis=0),
    "GatherND": made(gather_nd, batch_dims=0),
    "Scatter": made(scatter_elements, axis=0, reduction="none"),
    "ScatterElements": made(scatter_elements, axis=0, reduction="none"),
    "ScatterND": made(scatter_nd, reduction="none"),
    "Compress": made(compress, axis=None),
    "NonZero": made(nonzero),
    "TopK": moved(10, make_top_k, k=1),
    "ArgMax": made(arg_max, axis=0, keepdims=1, select_last_index=0),
    "ArgMin": made(arg_min, axis=0, keepdims=1, select_last_index=0),
    "CumSum": made(cum_sum, plain=(1,), exclusive=0, reverse=0),
    "CumProd": made(cum_prod, plain=(1,), exclusive=0, reverse=0),
    "ReverseSequence": made(reverse_sequence, batch_axis=1, time_axis=0),
    "Trilu": made(trilu, plain=(1,), upper=1),
}
"""Operators with indices -> their makers."""
