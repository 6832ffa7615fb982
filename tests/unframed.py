"""The graph in which an option is timed, without its neighbours: what it computes, and with which weights."""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from convrewrite.conv import ConvSpec, Size
from convrewrite.runtime.option_graphs import OptionGraph, conv_graph


def unframed(branches: OptionGraph, size: Size) -> bytes:
    """The same nodes and weights; input ``x`` is what the convolutions get, output ``y`` their sum itself."""
    graph = onnx.load_from_string(conv_graph(branches, size)).graph
    first, dims = branches[0][0], branches[0][0].dims
    nodes = list(graph.node)
    heads = [node for node in nodes if node.op_type == "Resize"]
    begin = nodes.index(heads[0]) + 1 if heads else 0
    end = next(i for i, node in enumerate(nodes) if node.op_type == "Relu")
    inner = nodes[begin:end]
    if heads:
        inner = [helper.make_node("Identity", ["x"], list(heads[0].output)), *inner]
    inner.append(helper.make_node("Identity", list(nodes[end].input), ["y"]))
    read = {name for node in inner for name in node.input}
    made = helper.make_graph(
        inner,
        "option",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, first.in_channels, *size[2 - dims :]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [tensor for tensor in graph.initializer if tensor.name in read],
    )
    opset = [helper.make_opsetid("", 20)]
    model: bytes = helper.make_model(made, opset_imports=opset, ir_version=9).SerializeToString()
    return model


def chains_of(model: bytes, branches: OptionGraph) -> list[nn.Sequential]:
    """The branches as modules, with the weights that a graph of theirs, framed or not, holds."""
    graph = onnx.load_from_string(model).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convs = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose")]
    given = iter(convs[len(convs) - sum(map(len, branches)) :])
    return [
        nn.Sequential(*(_conv(spec, [arrays[name] for name in next(given).input[1:]]) for spec in chain))
        for chain in branches
    ]


def _conv(spec: ConvSpec, arrays: list[np.ndarray]) -> nn.Module:
    module = spec.build()
    tensors = [torch.from_numpy(array.copy()) for array in arrays]
    module.load_state_dict(dict(zip(["weight", "bias"], tensors, strict=len(tensors) == 2)))
    return module
