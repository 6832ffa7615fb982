"""Nodes that become layers of torch, with parameters of their own: convolutions, BatchNorm, and products with a constant."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.modules import Operator
from convrewrite.onnx_graph.file import NodeView

CONVS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Callable[..., nn.Module]] = {
    1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d,
}  # fmt: skip


class StandingBatchNorm1d(nn.BatchNorm1d, Operator):
    """A BatchNorm that stays where it is: only those of torch's own types are folded into convolutions."""


class StandingBatchNorm2d(nn.BatchNorm2d, Operator):
    """The same for images."""


NORMS: dict[int, Callable[..., nn.Module]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip
STANDING_NORMS: dict[int, Callable[..., nn.Module]] = {
    2: StandingBatchNorm1d, 3: StandingBatchNorm1d, 4: StandingBatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip
"""Types of layers by the number of axes of the kernel, and of the input."""

Layers = Sequence[nn.Module]
"""Modules, one applied after another; the last is the layer itself."""


class ZeroPad(Operator):
    """Zeros around the last axes, ``pads`` in torch's order: the last axis first, begin and end."""

    def __init__(self, pads: Sequence[int]) -> None:
        super().__init__()
        self.pads = tuple(pads)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, ...)`` -> the same with larger axes."""
        return nn.functional.pad(x, self.pads)


class SamePad(Operator):
    """Zeros so that a convolution gives one number for each ``stride`` of its input, rounded up (``auto_pad`` SAME_*)."""

    def __init__(self, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], upper: bool) -> None:
        super().__init__()
        self.spans = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
        self.strides = tuple(strides)
        self.upper = upper

    @property
    def auto_pad(self) -> str:
        """As ONNX calls it."""
        return "SAME_UPPER" if self.upper else "SAME_LOWER"

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, ...)`` -> the same with larger axes."""
        pads: list[int] = []
        for size, span, stride in zip(x.shape[2:], self.spans, self.strides, strict=True):
            total = max(0, (math.ceil(size / stride) - 1) * stride + span - size)
            less, more = total // 2, total - total // 2
            pads = [*((less, more) if self.upper else (more, less)), *pads]
        return nn.functional.pad(x, pads)


class Product(Operator):
    """``x @ weight``, or ``weight @ x``, where torch has no layer for it."""

    def __init__(self, weight: Tensor, left: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.left = left

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return self.weight @ x if self.left else x @ self.weight


def layers_of(node: NodeView) -> Layers | None:
    """The layers that a node is; None for other nodes, and where torch has no such layer."""
    maker = MAKERS.get(node.op_type)
    return None if maker is None else maker(node)


def _conv(node: NodeView) -> Layers | None:
    weight, bias = _weight_and_bias(node)
    if weight is None:
        return None
    axes = weight.dim() - 2
    geometry = _geometry(node.attributes, tuple(weight.shape[2:]))
    if axes not in CONVS or geometry is None:
        return None
    pads, strides, dilations, groups = geometry
    same = node.attributes.get("auto_pad", "")
    alike = all(begin == end for begin, end in pads)
    module = CONVS[axes](
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), strides,
        tuple(begin for begin, _ in pads) if alike else 0, dilations, groups, bias is not None, device="meta",
    )  # fmt: skip
    _give(module, weight, bias)
    if same.startswith("SAME"):
        return SamePad(weight.shape[2:], strides, dilations, same == "SAME_UPPER"), module
    return (module,) if alike else (ZeroPad([n for pair in reversed(pads) for n in pair]), module)


def _conv_transpose(node: NodeView) -> Layers | None:
    weight, bias = _weight_and_bias(node)
    if weight is None or "output_shape" in node.attributes:
        return None
    axes = weight.dim() - 2
    geometry = _geometry(node.attributes, tuple(weight.shape[2:]), same=False)
    if axes not in TRANSPOSED or geometry is None:
        return None
    pads, strides, dilations, groups = geometry
    given = node.attributes.get("output_padding", [0] * axes)
    # torch crops the same at both ends, and then adds output padding, so that less is cropped at the end.
    extra = [n + begin - end for n, (begin, end) in zip(given, pads, strict=True)]
    if any(not 0 <= n < max(s, d) for n, s, d in zip(extra, strides, dilations, strict=True)):
        return None
    module = TRANSPOSED[axes](
        weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), strides, tuple(begin for begin, _ in pads),
        tuple(extra), groups, bias is not None, dilations, device="meta",
    )  # fmt: skip
    _give(module, weight, bias)
    return (module,)


def _weight_and_bias(node: NodeView) -> tuple[Tensor | None, Tensor | None]:
    """Those of a convolution; None for the weight where one of the two is no constant."""
    weight = node.constants[1]
    has_bias = len(node.present) > 2 and node.present[2]
    bias = node.constants[2] if has_bias else None
    return (None, None) if has_bias and bias is None else (weight, bias)


Geometry = tuple[list[tuple[int, int]], tuple[int, ...], tuple[int, ...], int]
"""Zeros at the begin and end of every axis, strides, dilations, and groups."""


def _geometry(attributes: Mapping[str, Any], kernel: tuple[int, ...], *, same: bool = True) -> Geometry | None:
    axes = len(kernel)
    strides = tuple(attributes.get("strides", [1] * axes))
    dilations = tuple(attributes.get("dilations", [1] * axes))
    how = attributes.get("auto_pad", "NOTSET")
    flat = list(attributes.get("pads", [0] * 2 * axes)) if how == "NOTSET" else [0] * 2 * axes
    pads = list(zip(flat[:axes], flat[axes:], strict=True))
    if how not in ("NOTSET", "VALID") and not (same and how in ("SAME_UPPER", "SAME_LOWER")):
        return None
    if any(n < 0 for pair in pads for n in pair):
        return None
    return pads, strides, dilations, int(attributes.get("group", 1))


def _give(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Put the tensors themselves into a module that was made without any."""
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)


def _batch_norm(node: NodeView) -> Layers | None:
    tensors = node.constants[1:5]
    statistics = (
        node.attributes.get("training_mode", 0) or sum(node.outputs) > 1 or not node.attributes.get("spatial", 1)
    )
    rank = node.ranks[0]
    if statistics or rank not in NORMS or any(tensor is None for tensor in tensors):
        return None
    scale, bias, mean, variance = tensors
    assert scale is not None and bias is not None and mean is not None and variance is not None
    if len({tuple(tensor.shape) for tensor in tensors if tensor is not None}) != 1:
        return None
    norms = STANDING_NORMS if node.stands else NORMS
    module = norms[rank](len(scale), eps=float(node.attributes.get("epsilon", 1e-5)), device="meta")
    _give(module, scale, bias)
    module.running_mean, module.running_var = mean.clone(), variance.clone()
    module.num_batches_tracked = torch.tensor(0)
    return (module,)


def _gemm(node: NodeView) -> Layers | None:
    a, b = node.attributes.get("transA", 0), node.attributes.get("transB", 0)
    alpha, beta = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
    weight = node.constants[1]
    has_bias = len(node.present) > 2 and node.present[2]
    bias = node.constants[2] if has_bias else None
    if weight is None or a or node.constants[0] is not None or (has_bias and bias is None):
        return None
    if not weight.is_floating_point():
        return None
    weight = (weight if b else weight.T) * alpha
    if bias is not None:
        if bias.numel() not in (1, len(weight)) or bias.dim() > 2 or (bias.dim() == 2 and bias.shape[0] != 1):
            return None
        bias = (bias.reshape(-1) * beta).expand(len(weight))
    return (_linear(weight, bias),)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    _give(module, weight.contiguous(), None if bias is None else bias.contiguous().clone())
    return module


def _matmul(node: NodeView) -> Layers | None:
    left, right = node.constants
    if (left is None) == (right is None):
        return None
    constant = right if left is None else left
    assert constant is not None
    if not constant.is_floating_point():  # torch makes no parameters of whole numbers
        return None
    if right is not None and right.dim() == 2 and (node.ranks[0] or 0) > 0:
        return (_linear(right.T, None),)
    return (Product(constant, left is not None),) if constant.numel() else None


MAKERS: Mapping[str, Callable[[NodeView], Layers | None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "BatchNormalization": _batch_norm,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
"""Operators -> functions that make their layers."""
