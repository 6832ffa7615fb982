"""The torch.fx graph of an ONNX graph, node by node."""

import operator
from collections import ChainMap, Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from torch import Tensor, fx, nn

from convrewrite.errors import ModelLoadError
from convrewrite.escaping import one_line
from convrewrite.modules import NamedOutputs, Operator
from convrewrite.onnx_files import PATIENCE
from convrewrite.onnx_graph.layers import SamePad, ZeroPad, layers_of
from convrewrite.onnx_graph.names import identifier, name_of_node
from convrewrite.onnx_graph.observing import Values
from convrewrite.onnx_graph.opaque import NAMED, Region
from convrewrite.onnx_graph.opening import Opened
from convrewrite.onnx_graph.operators import OPERATORS
from convrewrite.onnx_graph.ordering import leading_to, makers_of
from convrewrite.onnx_graph.trying import agrees, least_scale
from convrewrite.onnx_graph.views import Constants, names_used, outputs_of, view_of
from convrewrite.onnx_graph.walks import alone_uses, inner_graphs, uses_of

SITES = ("Conv", "ConvTranspose", "BatchNormalization")
"""Operators whose positions are remembered."""


class ToFloat(Operator):
    """Half precision in, float32 out."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers."""
        return x.float()


class Outputs(Operator):
    """Gathers what a graph gives under its names; ``half`` says which of them it has in half precision."""

    def __init__(self, names: Sequence[str], half: Sequence[bool]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.half_names = frozenset(name for name, is_half in zip(names, half, strict=True) if is_half)

    def forward(self, *values: Tensor) -> NamedOutputs:
        """Name -> tensor."""
        named = zip(self.names, values, strict=True)
        return NamedOutputs({name: value.half() if name in self.half_names else value for name, value in named})


@dataclass(frozen=True, slots=True)
class Built:
    """The module; see :class:`convrewrite.onnx_graph.translating.Translation` for the rest."""

    module: fx.GraphModule
    nodes: Mapping[str, int]
    pads: Mapping[str, tuple[tuple[int, ...], str]]
    opaque: Mapping[str, int]
    blocks_gradients: bool


@dataclass(slots=True)
class _Draft:
    """A graph in the making; ``pending`` are the positions of the nodes that the next region will run."""

    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, fx.Node] = field(default_factory=dict)
    pending: list[int] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    pads: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    opaque: Counter[str] = field(default_factory=Counter)
    blocks_gradients: bool = False

    def add(self, wanted: str, module: nn.Module, args: Sequence[fx.Node]) -> tuple[str, fx.Node]:
        """A call of a module under a name as near to ``wanted`` as can be; and that name."""
        name = identifier(wanted, "part", self.root._modules)
        self.root.add_module(name, module)
        return name, self.graph.call_module(name, tuple(args))


class Builder:
    """Builds a module of a graph, given what its nodes give in ``runs``."""

    def __init__(self, opened: Opened, constants: Constants, runs: Sequence[Values], inputs: Sequence[str]) -> None:
        file = opened.file
        self._file = file
        self._seconds = PATIENCE * opened.seconds
        self._graph = file.model.graph
        self._constants = constants
        self._runs = runs
        self._inputs = inputs
        self._uses = uses_of(file.model)
        self._makers = makers_of(self._graph)
        self._users = _users_of(self._graph)
        self._constant_names = dict.fromkeys(constants.names)
        self._ranks = {name: value.ndim for name, value in runs[0].items() if isinstance(value, np.ndarray)}

    def build(self, outputs: Sequence[str], with_operators: bool) -> Built:
        """A module that gives ``outputs``; without operators, onnxruntime runs everything but layers."""
        draft = _Draft()
        self._place_inputs(draft)
        needed = self._needed(outputs)
        for index, node in enumerate(self._graph.node):
            if index in needed:
                self._place(draft, index, node, with_operators)
        self._flush(draft, outputs)
        half = [self._is_half(name) for name in outputs]
        _, end = draft.add("outputs", Outputs(outputs, half), [draft.values[name] for name in outputs])
        draft.graph.output(end)
        draft.graph.lint()
        return Built(
            fx.GraphModule(draft.root, draft.graph), draft.nodes, draft.pads, dict(draft.opaque), draft.blocks_gradients
        )

    def _is_half(self, name: str) -> bool:
        return self._runs[0][name].dtype == np.float16

    def _place_inputs(self, draft: _Draft) -> None:
        taken: set[str] = set()
        for index, name in enumerate(self._inputs):
            plain = identifier(name, f"input_{index}", taken)
            taken.add(plain)
            draft.values[name] = draft.graph.placeholder(plain)
        for name in self._inputs:
            if self._is_half(name):
                _, draft.values[name] = draft.add(f"{name}_float", ToFloat(), [draft.values[name]])

    def _needed(self, outputs: Sequence[str]) -> set[int]:
        """The positions of the nodes that outputs depend on, except those that make constants."""
        return leading_to(self._graph, self._makers, outputs, self._constants.names)

    def _place(self, draft: _Draft, index: int, node: onnx.NodeProto, with_operators: bool) -> None:
        """One node: as layers, as an operator, or among those that wait for their region."""
        names = [name for name in node.input if name and name not in self._constants.names]
        made = self._made(node, names, with_operators)
        if made is None:
            draft.pending.append(index)
            draft.opaque[node.op_type] += 1
            return
        self._flush(draft, names)
        args = [draft.values[name] for name in names]
        *before, last = made
        for module in before:
            _, args[0] = draft.add(f"pad_{index}", module, args[:1])
        if isinstance(last, nn.Module):
            name, value = draft.add(name_of_node(node, index, draft.root._modules), last, args)
            if node.op_type in SITES:
                draft.nodes[name] = index
            if before:
                draft.pads[name] = _pads(before[0])
        else:
            value = draft.graph.call_function(last, tuple(args))
        self._name_outputs(draft, node, value)

    def _made(self, node: onnx.NodeProto, names: Sequence[str], with_operators: bool) -> Sequence[Any] | None:
        """What a node becomes, checked to compute the same; None where onnxruntime has to run it."""
        view = None if inner_graphs(node) else view_of(node, self._file, self._constants, self._ranks)
        if view is None:
            return None
        view = replace(view, stands=node.op_type == "BatchNormalization" and not self._folds(node))
        made: Sequence[Any] | None = layers_of(view)
        if made is None and with_operators and (maker := OPERATORS.get(view.op_type)) is not None:
            operation = maker(view)
            made = None if operation is None else (operation,)
        if made is None:
            return None
        for part in made:
            if isinstance(part, nn.Module):
                part.eval()
        return made if agrees(_chained(made), names, outputs_of(node), self._runs, least_scale(node.op_type)) else None

    def _folds(self, norm: onnx.NodeProto) -> bool:
        """Whether surgery can fold a BatchNormalization: no other node reads its input, not even one that the outputs do not
        need, and none of its numbers depends on inputs that are held."""
        return alone_uses(norm, self._uses) and not self._constants.from_held & set(norm.input)

    def _name_outputs(self, draft: _Draft, node: onnx.NodeProto, value: fx.Node) -> None:
        names = outputs_of(node)
        if len(names) == 1:
            draft.values[names[0]] = value
            return
        for position, name in enumerate(names):
            if name:
                draft.values[name] = draft.graph.call_function(operator.getitem, (value, position))

    def _flush(self, draft: _Draft, wanted: Sequence[str]) -> None:
        """Make a region of the nodes that wait, if one of them gives a value that is wanted now."""
        given = {name for index in draft.pending for name in self._graph.node[index].output}
        if not given & set(wanted):
            return
        # Values that onnxruntime cannot show, as those in bfloat16, go from no region to another: each makes its own.
        known = ChainMap[str, Any](draft.values, self._constant_names)  # no copies: there may be many regions
        positions = leading_to(self._graph, self._makers, given, known)
        draft.pending = []
        region = self._region_of(positions)
        draft.blocks_gradients |= all(
            any(self._runs[0][name].dtype.kind == "f" for name in side if isinstance(self._runs[0][name], np.ndarray))
            for side in (region.inputs, region.outputs)
        )
        _, value = draft.add(f"runtime_{region.operators[0].lower()}", region, [draft.values[n] for n in region.inputs])
        if len(region.outputs) == 1:
            draft.values[region.outputs[0]] = value
            return
        for position, name in enumerate(region.outputs):
            draft.values[name] = draft.graph.call_function(operator.getitem, (value, position))

    def _region_of(self, positions: set[int]) -> Region:
        operators = [self._graph.node[index].op_type for index in sorted(positions)]
        try:
            return Region(self._region(positions), self._file.folder, operators, self._seconds)
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            named = ", ".join(list(dict.fromkeys(operators))[:NAMED])
            raise ModelLoadError(
                f"{self._file.source}: expected that onnxruntime runs {named} apart from the rest of the graph, found that "
                f"{one_line(error, 300)}; a value of an optional type cannot go from one part to another: export "
                "the model without any"
            ) from error

    def _region(self, positions: set[int]) -> onnx.ModelProto:
        """A model of the nodes at these positions alone, with the constants they use."""
        nodes = [self._graph.node[index] for index in sorted(positions)]
        own = {name for node in nodes for name in node.output if name}
        used = dict.fromkeys(name for node in nodes for name in names_used(node) if name not in own)
        inside = [node for function in self._file.model.functions for node in function.node]
        with_lengths = any(inner_graphs(node) or node.op_type == "Resize" for node in (*nodes, *inside))
        model = onnx.ModelProto()
        model.ir_version, model.graph.name = max(self._file.model.ir_version, 4), "region"
        model.opset_import.extend(self._file.model.opset_import)
        model.functions.extend(self._file.model.functions)
        model.graph.node.extend(nodes)
        for name in used:
            if name in self._constants.names:
                model.graph.initializer.append(self._stored(name))
            else:
                model.graph.input.append(_described(name, self._runs, with_lengths))
        ends = {entry.name for entry in self._graph.output}
        given = [name for name in own if name in ends or not self._users.get(name, set()) <= positions]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(given) if name in self._runs[0])
        return model

    def _stored(self, name: str) -> onnx.TensorProto:
        stored = self._constants.initialiser(name)
        return stored if stored is not None else onnx.numpy_helper.from_array(self._constants.array(name), name)


def _users_of(graph: onnx.GraphProto) -> dict[str, set[int]]:
    """The positions of the nodes that use each value, or in which a graph does."""
    users = defaultdict[str, set[int]](set)
    for index, node in enumerate(graph.node):
        for name in names_used(node):
            users[name].add(index)
    return users


def _chained(made: Sequence[Any]) -> Any:
    *before, last = made

    def run(*args: Any) -> Any:
        given = list(args)
        for module in before:
            given[0] = module(given[0])
        return last(*given)

    return run


def _pads(module: nn.Module) -> tuple[tuple[int, ...], str]:
    """Zeros in ONNX's order, and ``auto_pad``."""
    if isinstance(module, SamePad):
        return (), module.auto_pad
    assert isinstance(module, ZeroPad)
    pairs = list(zip(module.pads[::2], module.pads[1::2], strict=True))[::-1]
    return (*(begin for begin, _ in pairs), *(end for _, end in pairs)), ""


def _described(name: str, runs: Sequence[Values], with_lengths: bool) -> onnx.ValueInfoProto:
    """A value as the input of a model: its type, and no size. ``with_lengths``: except for rows of whole numbers that are as long
    in every run, which may be shapes: some graphs inside of nodes must have fixed numbers of axes, and a Resize as many sizes."""
    value = runs[0][name]
    if isinstance(value, list):
        element = onnx.helper.np_dtype_to_tensor_dtype(value[0].dtype) if value else onnx.TensorProto.FLOAT
        kind = onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(element, None))
        return onnx.helper.make_value_info(name, kind)
    element = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    row = with_lengths and value.ndim == 1 and value.dtype.kind in "iu"
    alike = row and all(run[name].shape == value.shape for run in runs)
    return onnx.helper.make_tensor_value_info(name, element, value.shape if alike else [None] * value.ndim)
