"""What takes numbers from places, or puts them there; indices below zero count from the end."""

import math
from typing import Any

import torch
from torch import Tensor

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker, Numbers, ints, made, moved, number

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
"""What becomes of a number that is there already -> torch's word for it."""

NO_END = (2**31 - 1, 2**63 - 1)
"""Ends of a slice that mean the last place, or the first one on the way back."""


def slice_axes(
    x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> Tensor:
    """Begin and end of every axis, those below zero counted from its end, and where they lie beside it moved onto it."""
    begins, stops = ints(starts), ints(ends)
    along = range(len(begins)) if axes is None else ints(axes)
    strides = [1] * len(begins) if steps is None else ints(steps)
    for axis, begin, stop, step in zip(along, begins, stops, strides, strict=True):
        places = _places(x.shape[axis], begin, stop, step)
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


def _places(size: int, begin: int, stop: int, step: int) -> range:
    """Those of a slice; unlike in Python, a begin before the first place is the first one, also on the way back."""
    begin = min(max(begin + size if begin < 0 else begin, 0), size - 1 if step < 0 else size)
    if stop in NO_END:
        return range(begin, -1 if step < 0 else size, step)
    return range(begin, min(max(stop + size if stop < 0 else stop, -1 if step < 0 else 0), size), step)


def gather(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    """Slices along one axis; the axes of the indices take its place."""
    axis = axis % x.dim()
    taken = x.index_select(axis, _from_start(indices.reshape(-1), x.shape[axis]))
    return taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def gather_elements(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    """For every number its place along one axis."""
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
    """For every update its place along one axis."""
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
    """Indices of which none is below zero."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def compress(x: Tensor, condition: Tensor, *, axis: int | None) -> Tensor:
    """The slices along an axis for which the condition holds, or the numbers of all."""
    places = torch.nonzero(condition).reshape(-1)
    return x.reshape(-1)[places] if axis is None else x.index_select(axis, places)


def nonzero(x: Tensor) -> Tensor:
    """Where there is something: one column per place."""
    return torch.nonzero(x).t()


def top_k(x: Tensor, k: Numbers, *, axis: int, largest: int) -> tuple[Tensor, Tensor]:
    """In order; of equal numbers the one that comes first."""
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
    """The sum of all numbers up to here, of those from here on in reverse, without this one when exclusive."""
    along = ints(axis)[0]
    ordered = x.flip(along) if reverse else x
    if exclusive:
        first = torch.zeros_like(ordered.narrow(along, 0, 1))
        ordered = torch.cat([first, ordered.narrow(along, 0, x.shape[along] - 1)], along)
    sums = ordered.cumsum(along, dtype=x.dtype)
    return sums.flip(along) if reverse else sums


def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int, time_axis: int) -> Tensor:
    """The first numbers of every sequence in reverse, as many as its length."""
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
    "ReverseSequence": made(reverse_sequence, batch_axis=1, time_axis=0),
    "Trilu": made(trilu, plain=(1,), upper=1),
}
"""Operators with indices -> their makers."""
