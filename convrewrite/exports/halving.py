"""A float32 graph in half precision, except for what would overflow there.

The largest number of float16 is 65,504. A node whose inputs, weights or outputs come near it, on the inputs that were given,
stays in float32; so do values between two such nodes, which the converter would round to float16 and back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import TensorProto, helper, numpy_helper

from convrewrite.errors import ExportError
from convrewrite.onnx_files import open_session
from convrewrite.process import quiet

LARGEST = float(np.finfo(np.float16).max)

ROOM = 4.0
"""How many times larger values may be on other inputs than on those that were watched, before they overflow."""

SEPARATE = 4
"""Version of the format from which on initialisers need not be inputs of the graph."""

Feed = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Halved:
    """The graph, the names of nodes that stay float32 because of what overflows there, and how many nodes there are."""

    model: onnx.ModelProto
    kept: tuple[str, ...]
    nodes: int


def halved(model: onnx.ModelProto, feeds: Sequence[Feed]) -> Halved:
    """The graph with weights and values in float16, its inputs and outputs as they were. ``model`` is changed. On each of the
    ``feeds`` all values of the graph are held at the same time, so each should have few examples.

    Raises ExportError for one that has no float32 weights, and whatever the converter raises.
    """
    if not any(weight.data_type == TensorProto.FLOAT for weight in _weights(model.graph)):
        raise ExportError("expected float32 weights to halve, found none")
    _take_weights_from_inputs(model)
    _name_nodes(model.graph)
    large = _large(model, feeds)
    kept = tuple(node.name for node in model.graph.node if large & {*node.input, *node.output})
    own, nodes = {node.name for node in model.graph.node}, len(model.graph.node)
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        made = convert_float_to_float16(model, keep_io_types=True, node_block_list=list(kept))
    _join_casts(made.graph, set(kept), own)
    del made.graph.value_info[:]  # the converter leaves types of float16 on what is float32 still
    sorted_graph = onnx_ir.from_proto(made)
    sorted_graph.graph.sort()
    return Halved(onnx_ir.to_proto(sorted_graph), kept, nodes)


def _take_weights_from_inputs(model: onnx.ModelProto) -> None:
    """Leave weights out of the inputs: in old files every weight is an input as well, and inputs are not converted."""
    stored = {weight.name for weight in model.graph.initializer}
    left = [entry for entry in model.graph.input if entry.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(left)
    model.ir_version = max(model.ir_version, SEPARATE)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Name nodes without a name after their positions: those that stay float32 are given to the converter by their names."""
    taken = {node.name for node in graph.node}
    for index, node in enumerate(graph.node):
        name = node.name or f"node_{index}"
        while not node.name and name in taken:
            name += "_"
        node.name = name
        taken.add(name)


def _weights(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Initialisers, and values of Constant nodes, as some exporters write weights."""
    yield from graph.initializer
    yield from (entry.t for node in graph.node if node.op_type == "Constant" for entry in node.attribute)


def _large(model: onnx.ModelProto, feeds: Sequence[Feed]) -> set[str]:
    """Names of values and weights that come near the largest number."""
    limit = LARGEST / ROOM
    weights = {
        weight.name: np.abs(numpy_helper.to_array(weight)).max(initial=0.0)
        for weight in model.graph.initializer
        if weight.data_type == TensorProto.FLOAT
    }
    found = {name for name, largest in weights.items() if not largest <= limit}
    watched = onnx.ModelProto()
    watched.CopyFrom(onnx.shape_inference.infer_shapes(model))
    names = [entry.name for entry in watched.graph.value_info if entry.type.tensor_type.elem_type == TensorProto.FLOAT]
    made = {output for node in watched.graph.node for output in node.output}
    outputs = {entry.name for entry in watched.graph.output}
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in names
        if name in made and name not in outputs
    )
    session = open_session(watched.SerializeToString())
    asked = [entry.name for entry in session.get_outputs() if entry.type == "tensor(float)"]
    for feed in feeds:
        arrays = [*zip(asked, session.run(asked, dict(feed)), strict=True), *feed.items()]
        found |= {name for name, array in arrays if array.dtype == np.float32 and not _within(array, limit)}
    return found


def _within(array: Any, limit: float) -> bool:
    """Whether finite numbers lie within the limit: infinities of float32, as in masks, are infinities of float16."""
    finite = array[np.isfinite(array)]
    return bool(np.abs(finite).max(initial=0.0) <= limit)


def _join_casts(graph: onnx.GraphProto, kept: set[str], own: set[str]) -> None:
    """Remove the converter's casts of an input, or of the output of a node that stays float32, to float16 and back: a value
    beyond float16 would not survive them. The graph's ``own`` casts stay, as they may be from integers or booleans."""
    real = {entry.name for entry in graph.input if entry.type.tensor_type.elem_type == TensorProto.FLOAT}
    real |= {name for node in graph.node if node.name in kept for name in node.output}
    narrowed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if _is_cast(node, TensorProto.FLOAT16) and node.name not in own and node.input[0] in real
    }
    instead: dict[str, str] = {}
    outputs = {entry.name for entry in graph.output}
    for node in graph.node:
        if not (_is_cast(node, TensorProto.FLOAT) and node.input[0] in narrowed):
            continue
        source = narrowed[node.input[0]]
        if node.output[0] in outputs:
            node.CopyFrom(helper.make_node("Identity", [source], [node.output[0]], name=node.name))
        else:
            instead[node.output[0]] = source
    for node in graph.node:
        node.input[:] = [instead.get(name, name) for name in node.input]
    for idle in (instead, narrowed):  # first what casts back, then what that was cast from
        used = outputs | set(_used(graph))
        left = [node for node in graph.node if not (node.output[0] in idle and node.output[0] not in used)]
        del graph.node[:]
        graph.node.extend(left)


def _used(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of values that nodes read, those of graphs in their attributes too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _used(inner)
                yield from (entry.name for entry in inner.output)


def _is_cast(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and next(entry.i for entry in node.attribute if entry.name == "to") == kind
