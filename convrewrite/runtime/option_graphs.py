"""One option as a small ONNX graph, between the cheap neighbours that a network would give it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from convrewrite.conv import ConvSpec, Size, within_strides
from convrewrite.errors import UsageError
from convrewrite.targets import Program, Target

Array = NDArray[np.float32]

OptionGraph = tuple[tuple[ConvSpec, ...], ...]
"""An option as convolutions: branches that are added, each a chain."""

OPSET, IR_VERSION = 20, 9
"""Versions of the operators of a graph, and of its format."""

IMAGE_CHANNELS = 4
"""Up to this many channels an input is an image, which a network's stem gets as it lies in memory: such graphs have no head."""

RANDOM_NUMBERS = 1 << 16
"""Random numbers that weights repeat: to draw millions for each of hundreds of graphs takes longer than to time them."""

APART = 1009
"""Each kernel of a graph begins so many random numbers further on: runtimes compute branches of equal weights once, and five
branches would be timed as one."""

ONNX_PAD_MODE = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def conv_graph(branches: OptionGraph, input_size: Size, *, channels: int | None = None, dims: int = 2) -> bytes:
    """A serialised ONNX model that computes the sum of the branches, input ``x``, output ``y``.

    It lies between the cheap neighbours that :mod:`convrewrite.runtime.latency` draws; ``branches=()`` with ``channels`` and
    ``dims`` is the empty frame. Weights are random with a fixed seed; all is float32.
    """
    graph = _GraphBuilder()
    channels = branches[0][0].in_channels if branches else channels
    if channels is None:
        raise UsageError("conv_graph: expected branches, or channels for an empty frame; found neither")
    dims = branches[0][0].dims if branches else dims
    headed = channels > IMAGE_CHANNELS
    name = graph.head(channels, input_size[2 - dims :]) if headed else "x"
    shape = [1, 1, *[1] * dims] if headed else [1, channels, *input_size[2 - dims :]]
    size = input_size
    if branches:
        name, size = graph.branches(branches, name, input_size)
        name = graph.node("Relu", [name])
    name = graph.node("MaxPool", [name], kernel_shape=[1] * dims, strides=list(size[2 - dims :]))
    return graph.serialised(shape, name)


def option_program(
    target: Target, branches: OptionGraph, input_size: Size, *, channels: int, dims: int
) -> tuple[Program, tuple[int, ...]]:
    """An option in the form that a target takes, framed where that is ONNX, and the shape of its one input, of one example."""
    plain = (1, channels, *input_size[2 - dims :])
    if target.takes == "module":
        return Program(module=_Summed(branches).eval()), plain
    model = conv_graph(branches, input_size, channels=channels, dims=dims)
    return Program(onnx=model), (1, 1, *[1] * dims) if channels > IMAGE_CHANNELS else plain


class _Summed(nn.Module):
    """The sum of branches, each a chain of convolutions with their initial weights; without branches, its input.

    The computation of a kernel for every example is left out, as in the graphs.
    """

    def __init__(self, branches: OptionGraph) -> None:
        super().__init__()
        chains = [nn.Sequential(*(spec.mixed.build(torch.float32) for spec in chain)) for chain in branches]
        self.branches = nn.ModuleList(chains)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> the same with the output's channels and size."""
        if not self.branches:
            return x
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class _GraphBuilder:
    """Nodes and initialisers of one ONNX graph in the making."""

    def __init__(self) -> None:
        self._block = np.random.default_rng(0).standard_normal(RANDOM_NUMBERS, np.float32)
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: list[onnx.TensorProto] = []

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, array: NDArray[np.generic]) -> str:
        name = f"c{len(self._initialisers)}"
        self._initialisers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def head(self, channels: int, size: Sequence[int]) -> str:
        point = [1] * len(size)
        kernel = self.constant(np.full((channels, 1, *point), 0.5, np.float32))
        scales = self.constant(np.array([1, 1, *size], np.float32))
        pixel = self.node("Conv", ["x", kernel], kernel_shape=point)
        return self.node(
            "Resize", [pixel, "", scales], mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip

    def branches(self, branches: OptionGraph, name: str, size: Size) -> tuple[str, Size]:
        total, out_size = "", size
        for chain in branches:
            end, out_size = name, size
            for spec in chain:
                end = self.conv(spec, end)
                out_size = spec.output_size(out_size)
            total = self.node("Add", [total, end]) if total else end
        return total, out_size

    def conv(self, spec: ConvSpec, source: str) -> str:
        spec = spec.mixed  # the mixing itself is left out: it takes as long in the original as in its replacements
        weight, bias = self._random_weights(spec)
        axes = slice(2 - spec.dims, 2)
        margins = list(spec.padding_pairs())[axes]
        before, after = [pair[0] for pair in margins], [pair[1] for pair in margins]
        pads = [*before, *after]
        if spec.padding_mode != "zeros":
            amounts = self.constant(np.array([0, 0, *before, 0, 0, *after], np.int64))
            source = self.node("Pad", [source, amounts], mode=ONNX_PAD_MODE[spec.padding_mode])
            pads = [0] * len(pads)
        inputs = [source, *(self.constant(array) for array in (weight, bias) if array is not None)]
        geometry: dict[str, Any] = {
            "kernel_shape": spec.kernel_size[axes], "strides": spec.stride[axes], "dilations": spec.dilation[axes],
            "pads": pads, "group": spec.groups,
        }  # fmt: skip
        if spec.transposed:
            first = 2 - spec.dims
            ends = within_strides(pads, spec.output_padding[first:], spec.stride[first:])
            geometry |= {"pads": ends[0], "output_padding": ends[1]}
            return self.node("ConvTranspose", inputs, **geometry)
        return self.node("Conv", inputs, **geometry)

    def _random_weights(self, spec: ConvSpec) -> tuple[Array, Array | None]:
        block = np.roll(self._block, -APART * len(self._initialisers))
        weight = np.resize(block, spec.weight_shape) / np.float32(spec.patch**0.5)
        bias = np.full(spec.out_channels, 0.1, np.float32) if spec.bias else None
        return weight, bias

    def serialised(self, shape: list[int], output: str) -> bytes:
        graph = helper.make_graph(
            [*self._nodes, helper.make_node("Identity", [output], ["y"])],
            "option",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "o", "h", "w"])],
            self._initialisers,
        )
        opset = [helper.make_opsetid("", OPSET)]
        model: bytes = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION).SerializeToString()
        return model
