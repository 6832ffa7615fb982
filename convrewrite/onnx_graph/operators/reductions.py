"""What makes one number of many, along some axes or all."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from convrewrite.onnx_graph.operators.computed import Maker, Numbers, ints, made, moved

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]
"""What reduces a tensor along these axes, keeping them with size 1 or not."""


def reduced(
    reduction: Reduction, x: Tensor, axes: Numbers | None = None, *, keepdims: int, noop_with_empty_axes: int
) -> Tensor:
    """Along ``axes``; if there are none, along all or, with ``noop_with_empty_axes``, along none."""
    along = tuple(axis % max(x.dim(), 1) for axis in ints(axes)) if axes is not None else ()
    if not along and not noop_with_empty_axes:
        along = tuple(range(x.dim()))
    return reduction(x, along, bool(keepdims))


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    count = math.prod(x.shape[axis] for axis in axes)
    if x.is_floating_point():
        return x.mean(axes, keep) if axes else x
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _largest(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _extreme(x, axes, keep, torch.amax, lowest=True)


def _smallest(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _extreme(x, axes, keep, torch.amin, lowest=False)


def _extreme(
    x: Tensor, axes: tuple[int, ...], keep: bool, reduction: Callable[..., Tensor], lowest: bool
) -> Tensor:  # fmt: skip
    """The extreme of no numbers is the number that never wins."""
    if not axes:
        return x
    if all(x.shape[axis] for axis in axes):
        return reduction(x, axes, keep)
    shape = x.sum(axes, keep).shape
    if x.dtype == torch.bool:
        return x.new_full(shape, not lowest)
    if x.is_floating_point():
        return x.new_full(shape, -math.inf if lowest else math.inf)
    info = torch.iinfo(x.dtype)
    return x.new_full(shape, info.min if lowest else info.max)


def _sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if not x.is_floating_point():
        return torch.sqrt(_sum_square(x, axes, keep)).to(x.dtype)
    return torch.linalg.vector_norm(x, 2, axes, keep) if axes else x.abs()  # unlike a root, it has a gradient at zero


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep)).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep) if axes else x


def _maker(reduction: Reduction, axes_moved: int = 18) -> Maker:
    """``axes_moved``: the version of the standard operators in which the axes became an input."""
    maker = made(partial(reduced, reduction), plain=(1,), keepdims=1, noop_with_empty_axes=0)
    return moved(axes_moved, maker, axes=1)


REDUCTIONS: dict[str, Maker] = {
    "ReduceSum": _maker(_sum, axes_moved=13),
    "ReduceMean": _maker(_mean),
    "ReduceProd": _maker(_prod),
    "ReduceMax": _maker(_largest),
    "ReduceMin": _maker(_smallest),
    "ReduceL1": _maker(_l1),
    "ReduceL2": _maker(_l2),
    "ReduceSumSquare": _maker(_sum_square),
    "ReduceLogSum": _maker(_log_sum),
    "ReduceLogSumExp": _maker(_log_sum_exp),
}
"""Operators that reduce -> their makers."""
