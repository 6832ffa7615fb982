"""What moves a window over an image, or looks at all of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker, made
from convrewrite.onnx_graph.operators.padding import pad_constant

AVERAGES: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
"""By the number of axes of the image."""

MAXIMA: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
"""By the number of axes of the image."""


@dataclass(frozen=True, slots=True)
class Window:
    """A window that moves over an image; every sequence has one entry per axis of the image.

    Attributes:
        kernel, strides, dilations: in places.
        begins, ends: places added around the image.
        same: "upper" or "lower" when there is to be one output per stride, with an odd place around the image at the
            end or at the begin; otherwise "".
        ceil: whether a window that reaches beyond the end counts, if it begins before it.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    same: str
    ceil: bool

    @property
    def reach(self) -> tuple[int, ...]:
        """Places from the first to the last of a window."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def even(self) -> bool:
        """Whether torch's own layers pad like this: the same at both ends, and at most half of the kernel."""
        return not self.same and self.begins == self.ends and all(
            2 * pad <= k for pad, k in zip(self.begins, self.kernel, strict=True)
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Along:
    """A window along one axis of an image of one size: the places around it, and the outputs."""

    begin: int
    end: int
    outputs: int


def window_of(view: NodeView) -> Window | None:
    """The window of a pooling node; None where its attributes do not fit each other, or a window may lie beside the image."""
    given = view.attributes
    kernel = tuple(given["kernel_shape"])
    dims = len(kernel)
    strides = tuple(given.get("strides") or [1] * dims)
    dilations = tuple(given.get("dilations") or [1] * dims)
    auto_pad = given.get("auto_pad") or "NOTSET"
    pads = tuple(given.get("pads") or [0] * (2 * dims)) if auto_pad == "NOTSET" else (0,) * (2 * dims)
    same = {"SAME_UPPER": "upper", "SAME_LOWER": "lower"}.get(auto_pad, "")
    if view.ranks[0] != dims + 2 or not 1 <= dims <= 3 or (not same and auto_pad not in ("NOTSET", "VALID")):
        return None
    if (len(strides), len(dilations), len(pads)) != (dims, dims, 2 * dims) or min(kernel + strides + dilations) < 1:
        return None
    if same and any(d > 1 or k < s for d, k, s in zip(dilations, kernel, strides, strict=True)):
        return None  # onnxruntime ignores dilations here, and cuts off what the strides leave over
    if any(not 0 <= pad < k for pad, k in zip(pads, kernel * 2, strict=True)):
        return None
    return Window(kernel, strides, dilations, pads[:dims], pads[dims:], same, bool(given.get("ceil_mode", 0)))


def along_axes(window: Window, sizes: Sequence[int]) -> list[Along]:
    """The window on an image of these sizes."""
    found = []
    for i, size in enumerate(sizes):
        reach, stride, begin, end = window.reach[i], window.strides[i], window.begins[i], window.ends[i]
        if window.same:
            outputs = -(-size // stride)
            around = max((outputs - 1) * stride + reach - size, 0)
            begin = around // 2 if window.same == "upper" else around - around // 2
            end = around - begin
        else:
            room = size + begin + end - reach
            outputs = (-(-room // stride) if window.ceil else room // stride) + 1
            if window.ceil and (outputs - 1) * stride >= size + begin:
                outputs -= 1
        found.append(Along(begin, end, outputs))
    return found


def _framed(x: Tensor, window: Window, along: Sequence[Along], value: float) -> Tensor:
    """The image, padded or cut to exactly what all windows cover."""
    ends = [
        (axis.outputs - 1) * stride + reach - size - axis.begin
        for axis, stride, reach, size in zip(along, window.strides, window.reach, x.shape[2:], strict=True)
    ]
    around = [(axis.begin, end) for axis, end in zip(along, ends, strict=True)]
    if not any(amount for pair in around for amount in pair):
        return x
    return pad_constant(x, [(0, 0), (0, 0), *around], value)


def max_pool(x: Tensor, *, window: Window) -> Tensor:
    """The largest number in every window."""
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    framed = _framed(x, window, along_axes(window, x.shape[2:]), lowest)
    pool = MAXIMA[len(window.kernel) - 1]
    return pool(framed, window.kernel, window.strides, dilation=window.dilations)


def average_pool(x: Tensor, *, window: Window, count_padding: bool) -> Tensor:
    """The mean of every window, over its places within the image, or over padded places too."""
    along = along_axes(window, x.shape[2:])
    total = _window_sums(_framed(x, window, along, 0), window)
    for i, axis in enumerate(along):
        counts = [len(_inside(window, axis, i, o, x.shape[2 + i], count_padding)) for o in range(axis.outputs)]
        divisor = torch.tensor(counts, dtype=x.dtype, device=x.device)
        total = total / divisor.reshape(-1, *[1] * (len(along) - 1 - i))
    return total


def _inside(window: Window, axis: Along, i: int, output: int, size: int, count_padding: bool) -> list[int]:
    """The places of one window along one axis that count, from the begin of the padding."""
    start = output * window.strides[i]
    places = range(start, start + window.reach[i], window.dilations[i])
    first, last = (0, axis.begin + size + axis.end) if count_padding else (axis.begin, axis.begin + size)
    return [place for place in places if first <= place < last]


def _window_sums(framed: Tensor, window: Window) -> Tensor:
    """The sum of every window of an image that the windows cover exactly."""
    if set(window.dilations) == {1}:
        mean = AVERAGES[len(window.kernel) - 1](framed, window.kernel, window.strides)
        return mean * math.prod(window.kernel)
    for i, (kernel, dilation, stride) in enumerate(
        zip(window.kernel, window.dilations, window.strides, strict=True), start=2
    ):
        windows = framed.unfold(i, (kernel - 1) * dilation + 1, stride)
        framed = windows[..., ::dilation].sum(-1)
    return framed


def lp_pool(x: Tensor, *, window: Window, p: int) -> Tensor:
    """The norm of every window."""
    framed = _framed(x.abs() ** p, window, along_axes(window, x.shape[2:]), 0)
    total = _window_sums(framed, window)
    nothing = total == 0
    root = torch.where(nothing, torch.ones_like(total), total) ** (1 / p)
    return torch.where(nothing, torch.zeros_like(total), root)  # the gradient of a root at zero cannot be used


def global_average(x: Tensor) -> Tensor:
    """The mean of every channel."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_maximum(x: Tensor) -> Tensor:
    """The largest number of every channel."""
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def global_norm(x: Tensor, *, p: int) -> Tensor:
    """The norm of every channel."""
    return torch.linalg.vector_norm(x, p, tuple(range(2, x.dim())), keepdim=True)


def make_max_pool(view: NodeView) -> Made | None:
    """Torch's own layer where it computes the same; None where the places of the maxima are used."""
    window = window_of(view)
    if window is None or any(view.outputs[1:]):
        return None
    if len(window.kernel) == 2 and window.even and len(view.outputs) == 1:
        return nn.MaxPool2d(*_twos(window), dilation=window.dilations, ceil_mode=window.ceil)
    return Computed(max_pool, view, {"window": window})


def make_average_pool(view: NodeView) -> Made | None:
    """Torch's own layer where it computes the same."""
    window = window_of(view)
    if window is None:
        return None
    count_padding = bool(view.attributes.get("count_include_pad", 0))
    if len(window.kernel) == 2 and window.even and not window.ceil and set(window.dilations) == {1}:
        return nn.AvgPool2d(*_twos(window), count_include_pad=count_padding)
    return Computed(average_pool, view, {"window": window, "count_padding": count_padding})


def _twos(window: Window) -> tuple[Any, Any, Any]:
    """Kernel, stride and padding as torch's layers want them."""
    return window.kernel, window.strides, window.begins


def make_lp_pool(view: NodeView) -> Made | None:
    """The norm is the 2-norm where none is given."""
    window = window_of(view)
    return None if window is None else Computed(lp_pool, view, {"window": window, "p": view.attributes.get("p", 2)})


POOLING: dict[str, Maker] = {
    "MaxPool": make_max_pool,
    "AveragePool": make_average_pool,
    "LpPool": make_lp_pool,
    "GlobalAveragePool": made(global_average),
    "GlobalMaxPool": made(global_maximum),
    "GlobalLpPool": made(global_norm, p=2),
}
"""Operators that pool -> their makers."""
