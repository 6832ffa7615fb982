"""A chain of convolutions, or a sum of such, as nodes of an ONNX graph with initialisers of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from convrewrite.conv import within_strides
from convrewrite.errors import ExportError
from convrewrite.layers import SumOfBranches
from convrewrite.onnx_graph.walks import Names

ConvModule = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
"""ONNX's types of weights -> torch's; a convolution takes no others."""

PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""Names of ``nn.Conv2d`` -> names of ONNX's Pad."""

PADS_AS_INPUT, WRAP = 11, 19
"""Versions of the standard operators from which Pad takes its amounts as an input, and from which it wraps around."""

EQUAL_SHAPES_ADD = 7
"""Version from which onnxruntime has Add; before that it has Sum, which does the same for values of the same shape."""


@dataclass(frozen=True, slots=True)
class Margin:
    """Zeros around the input of a chain: ``pads``, in ONNX's order, or what ``auto_pad`` makes of the size of the input."""

    pads: tuple[int, ...] = ()
    auto_pad: str = ""


class Emitter:
    """Makes nodes and initialisers for one model; a weight that several modules share becomes one initialiser."""

    def __init__(self, names: Names, opset: int, source: str) -> None:
        """``source`` names the model in errors."""
        self.initialisers: list[TensorProto] = []
        self._names, self._opset, self._source = names, opset, source
        self._made: dict[tuple[int, int], str] = {}

    @property
    def names(self) -> dict[int, str]:
        """The initialisers made so far, by the ids of the tensors that they hold."""
        return {identity: name for (identity, _), name in self._made.items()}

    def nodes(
        self, module: nn.Module, source: str, target: str, base: str, margin: Margin, kind: int
    ) -> list[onnx.NodeProto]:
        """The nodes that compute value ``target`` from value ``source`` as ``module`` does, named after ``base``.

        ``margin`` is what lies around the source besides the module's own padding, ``kind`` ONNX's type of the weights. Raises
        ExportError for a module that is no chain of convolutions, and for what the model's operators cannot express.
        """
        chains = self.chains(module, base)
        made: list[onnx.NodeProto] = []
        ends: list[str] = []
        for number, stages in enumerate(chains):
            alone = len(chains) == 1
            name = base if alone else f"{base}.{number}"
            ends.append(target if alone else self._names.new(f"{name}.out"))
            made += self._chain(stages, source, ends[-1], name, margin, kind)
        return made if len(ends) == 1 else made + self._sum(ends, target, base)

    def chains(self, module: nn.Module, base: str) -> list[list[ConvModule]]:
        """The convolutions of each branch of a module. Raises ExportError for a branch with anything else, or with none."""
        branches = list(module) if isinstance(module, SumOfBranches) else [module]
        parts = [list(branch) if isinstance(branch, nn.Sequential) else [branch] for branch in branches]
        chains = [[part for part in branch if isinstance(part, ConvModule)] for branch in parts]
        if not chains or not all(chains) or chains != parts:
            others = [type(part).__name__ for branch in parts for part in branch if not isinstance(part, ConvModule)]
            raise ExportError(
                f"{self._source}: {base}: expected a chain of convolutions in its place, found "
                f"{', '.join(others) or 'an empty one'}; leave it as it is"
            )
        return chains

    def _chain(
        self, stages: list[ConvModule], source: str, target: str, base: str, margin: Margin, kind: int
    ) -> list[onnx.NodeProto]:
        if len(margin.pads) not in (0, 2 * len(stages[0].kernel_size)):
            raise ExportError(
                f"{self._source}: {base}: expected pads before and after on each of {len(stages[0].kernel_size)} axes, found "
                f"{len(margin.pads)}; leave this convolution as it is"
            )
        made: list[onnx.NodeProto] = []
        value = source
        for number, (stage, extra) in enumerate(zip(stages, placed_pads(stages, margin.pads), strict=True)):
            name = self._names.new(f"{base}.stage{number}")
            end = target if number == len(stages) - 1 else self._names.new(f"{name}.out")
            made += self._stage(stage, (value, end), name, Margin(tuple(extra), margin.auto_pad), kind)
            value = end
        return made

    def _stage(
        self, stage: ConvModule, values: tuple[str, str], name: str, margin: Margin, kind: int
    ) -> list[onnx.NodeProto]:
        (source, target), own, extra = values, own_pads(stage), list(margin.pads)
        transposed, mirrored = isinstance(stage, TRANSPOSED), stage.padding_mode != "zeros" and any(own)
        made: list[onnx.NodeProto] = []
        if any(extra) and (transposed or mirrored or min(extra) < 0):
            made.append(self._pad(source, extra, "constant", name))
            source, extra = made[-1].output[0], [0] * len(extra)
        if mirrored:
            made.append(self._pad(source, own, PAD_MODES[stage.padding_mode], name))
            source, own = made[-1].output[0], [0] * len(own)
        given = [(stage.weight, "weight"), *([] if stage.bias is None else [(stage.bias, "bias")])]
        inputs = [source, *(self._weight(tensor, f"{name}.{part}", kind) for tensor, part in given)]
        geometry: dict[str, Any] = {
            "kernel_shape": stage.kernel_size, "strides": stage.stride, "dilations": stage.dilation,
            "pads": [a + b for a, b in zip(own, extra, strict=True)], "group": stage.groups,
        }  # fmt: skip
        if margin.auto_pad:  # on an axis where a stage has neither kernel nor stride, it adds nothing
            del geometry["pads"]
            geometry["auto_pad"] = margin.auto_pad
        if isinstance(stage, TRANSPOSED):
            pads, output_padding = within_strides(geometry["pads"], stage.output_padding, stage.stride)
            geometry |= {"pads": pads, "output_padding": output_padding}
        made.append(helper.make_node("ConvTranspose" if transposed else "Conv", inputs, [target], name, **geometry))
        return made

    def _pad(self, source: str, pads: list[int], mode: str, name: str) -> onnx.NodeProto:
        if mode == "wrap" and self._opset < WRAP:
            raise ExportError(
                f"{self._source}: {name}: expected operators of version {WRAP}, from which a Pad wraps around, found "
                f"{self._opset}; convert the model to that version, or leave this convolution as it is"
            )
        name = self._names.new(f"{name}.pad")
        half = len(pads) // 2
        amounts = [0, 0, *pads[:half], 0, 0, *pads[half:]]
        output = [self._names.new(f"{name}.out")]
        if self._opset < PADS_AS_INPUT:
            given: dict[str, Any] = {"paddings" if self._opset < 2 else "pads": amounts, "mode": mode}
            return helper.make_node("Pad", [source], output, name, **given)
        self.initialisers.append(numpy_helper.from_array(np.array(amounts, np.int64), self._names.new(f"{name}.pads")))
        return helper.make_node("Pad", [source, self.initialisers[-1].name], output, name, mode=mode)

    def _sum(self, ends: list[str], target: str, base: str) -> list[onnx.NodeProto]:
        """In the order of the branches."""
        name = f"{base}.sum"
        if self._opset < EQUAL_SHAPES_ADD:
            return [helper.make_node("Sum", ends, [target], self._names.new(name))]
        made: list[onnx.NodeProto] = []
        total = ends[0]
        for number, end in enumerate(ends[1:], 1):
            node = self._names.new(name)
            output = target if number == len(ends) - 1 else self._names.new(f"{node}.out")
            made.append(helper.make_node("Add", [total, end], [output], node))
            total = output
        return made

    def _weight(self, tensor: Tensor, name: str, kind: int) -> str:
        """The name of the initialiser that holds a tensor."""
        known = self._made.get((id(tensor), kind))
        if known is not None:
            return known
        values = tensor.detach().cpu().to(DTYPES[kind]).contiguous()
        if not torch.equal(values.isfinite().cpu(), tensor.detach().cpu().isfinite()):
            raise ExportError(
                f"{self._source}: {name}: expected numbers within {DTYPES[kind]}, the type of the model, found larger ones; "
                "leave this convolution as it is, or convert the model to float32 first"
            )
        raw = values.view(torch.uint8).numpy().tobytes()
        made = TensorProto(name=self._names.new(name), data_type=kind, dims=list(values.shape), raw_data=raw)
        self.initialisers.append(made)
        self._made[id(tensor), kind] = made.name
        return str(made.name)


def placed_pads(stages: Sequence[ConvModule], pads: Sequence[int]) -> list[list[int]]:
    """Zeros around the input of a chain -> zeros around the input of each of its stages, in ONNX's order.

    Those of an axis go to the first stage whose kernel sees more than one place along it: a kernel that sees one place, without
    a bias, turns zeros into zeros, so they need not go through it. Otherwise they stay with the first stage.
    """
    axes = len(stages[0].kernel_size)
    placed = [[0] * (2 * axes) for _ in stages]
    if not pads:
        return placed
    for axis in range(axes):
        seeing = next((number for number, stage in enumerate(stages) if stage.kernel_size[axis] > 1), 0)
        place = seeing if all(_keeps_zeros(stage, axis) for stage in stages[:seeing]) else 0
        for side in (axis, axis + axes):
            placed[place][side] = pads[side]
    return placed


def own_pads(stage: ConvModule) -> list[int]:
    """What a module itself adds around its input, or cuts from its output where it is transposed; all begins, then all ends."""
    if stage.padding == "valid":
        return [0] * (2 * len(stage.kernel_size))
    if stage.padding == "same":
        totals = [d * (k - 1) for d, k in zip(stage.dilation, stage.kernel_size, strict=True)]
        return [total // 2 for total in totals] + [total - total // 2 for total in totals]
    return [int(size) for size in stage.padding] * 2


def _keeps_zeros(stage: ConvModule, axis: int) -> bool:
    """Whether zeros around a stage's input are as many zeros around its output."""
    plain = stage.padding_mode == "zeros" and not isinstance(stage, TRANSPOSED)
    return plain and stage.bias is None and stage.stride[axis] == 1
