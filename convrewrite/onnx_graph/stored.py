"""Parameters that a file stores: real numbers in initialisers and Constant nodes, also inside of nodes and functions."""

import math
from collections.abc import Iterable

import onnx
from onnx import TensorProto

from convrewrite.onnx_graph.walks import STANDARD_DOMAINS, inner_graphs

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

NORM = "BatchNormalization"
"""The operator whose statistics are no parameters."""


def parameters_stored(graph: onnx.GraphProto) -> dict[str, int]:
    """How many numbers a graph stores of each value. What graphs inside of a node store goes by the first output it has."""
    found = {one.name: _numbers(one) for one in graph.initializer}
    found |= {one.values.name: _in_sparse(one) for one in graph.sparse_initializer}
    return _without_statistics(found, graph.node)


def stored_in_functions(model: onnx.ModelProto) -> int:
    """How many numbers the functions of a model store, however often they are called."""
    return sum(sum(_without_statistics({}, function.node).values()) for function in model.functions)


def _without_statistics(initialisers: dict[str, int], nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    """The initialisers, and what nodes store, except means and variances."""
    found = initialisers | {next(filter(None, node.output), ""): _in_node(node) for node in nodes}
    statistics = {name for node in nodes if node.op_type == NORM for name in node.input[3:5]}
    return {name: number for name, number in found.items() if name not in statistics}


def _in_node(node: onnx.NodeProto) -> int:
    if node.op_type != "Constant" or node.domain not in STANDARD_DOMAINS:
        return sum(sum(parameters_stored(graph).values()) for graph in inner_graphs(node))
    for attribute in node.attribute:
        if attribute.HasField("t"):
            return _numbers(attribute.t)
        if attribute.HasField("sparse_tensor"):
            return _in_sparse(attribute.sparse_tensor)
        if attribute.name in ("value_float", "value_floats"):
            return len(attribute.floats) or 1
    return 0


def _in_sparse(tensor: onnx.SparseTensorProto) -> int:
    """With its zeros, as a layer has them."""
    return math.prod(tensor.dims) if tensor.values.data_type in FLOATS else 0


def _numbers(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) if tensor.data_type in FLOATS else 0
