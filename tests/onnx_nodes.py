"""Single ONNX nodes: as makers see them, as onnxruntime computes them, and as what the makers make computes them."""

import copy
import pickle
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators import OPERATORS

HALVES = {np.dtype(np.float16): torch.float16, np.dtype(ml_dtypes.bfloat16): torch.bfloat16}

COMPUTED = {"bool", "int8", "int16", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64"}
"""Types of numbers that torch computes with; it has the larger unsigned ones, but hardly an operation on them."""

GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def as_tensor(value: Any) -> Tensor:
    """A constant or an input of its own memory; half precision is computed in single."""
    value = np.asarray(value)
    return torch.from_numpy(np.array(value, dtype=np.float32 if value.dtype in HALVES else value.dtype))


def attribute(proto: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(proto)
    if isinstance(value, onnx.TensorProto):
        return as_tensor(numpy_helper.to_array(value))
    if isinstance(value, bytes):
        return value.decode()
    if proto.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS, onnx.AttributeProto.STRINGS):
        return [part.decode() if isinstance(part, bytes) else part for part in value]
    return value


def is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype.name in COMPUTED


def view_of(
    node: onnx.NodeProto, opset: int, values: Mapping[str, Any], constants: Collection[int] = ()
) -> NodeView:  # fmt: skip
    """The node with the inputs at these positions as constants, and with all its outputs used."""
    here = [values.get(name) if name else None for name in node.input]
    return NodeView(
        op_type=node.op_type,
        opset=opset,
        attributes={proto.name: attribute(proto) for proto in node.attribute if proto.type not in GRAPHS},
        constants=tuple(as_tensor(v) if is_tensor(v) and i in constants else None for i, v in enumerate(here)),
        present=tuple(bool(name) for name in node.input),
        ranks=tuple(np.ndim(value) if is_tensor(value) else None for value in here),
        outputs=tuple(bool(name) for name in node.output),
    )


def key_of(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def make(view: NodeView, key: str = "") -> Any:
    return OPERATORS[key or view.op_type](view)


def call(made: Any, view: NodeView, node: onnx.NodeProto, values: Mapping[str, Any]) -> list[Any]:
    """What a copy of the made thing gives, one entry per output that the node has; its inputs stay as they are."""
    names = [name for name, constant in zip(node.input, view.constants, strict=True) if name and constant is None]
    given = [as_tensor(values[name]) for name in names]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    result = copied.eval()(*given) if isinstance(copied, nn.Module) else copied(*given)
    for name, tensor in zip(names, given, strict=True):
        assert torch.equal(tensor.nan_to_num(), as_tensor(values[name]).nan_to_num()), f"{name} was written to"
    if len(node.output) == 1:
        assert isinstance(result, Tensor)
        return [result]
    assert isinstance(result, tuple)
    return [value for value, name in zip(result, node.output, strict=False) if name]


def runtime_outputs(model: onnx.ModelProto, values: Mapping[str, Any]) -> list[Any] | None:
    """What onnxruntime computes, nothing optimised away; None where it cannot run the model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, {entry.name: np.asarray(values[entry.name]) for entry in session.get_inputs()})
    except Exception:  # onnxruntime's errors have no common type
        return None


def assert_same(found: Tensor, wanted: Any) -> None:
    """Alike in shape, type and numbers, to the precision of the type."""
    wanted = np.asarray(wanted)
    expected, half = as_tensor(wanted), HALVES.get(wanted.dtype)
    assert found.dtype == expected.dtype
    if half is not None:
        found, expected = found.to(half), expected.to(half)
    torch.testing.assert_close(found.detach(), expected, equal_nan=True)


def one_node(
    op_type: str, opset: int, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None, outputs: int = 1
) -> tuple[onnx.ModelProto, dict[str, Any]]:  # fmt: skip
    """A model of one node, and what it is called with; an input of None is left out. The domain is written before ``::``."""
    domain, _, op_type = op_type.rpartition("::")
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(inputs)]
    values = {name: np.asarray(value) for name, value in zip(names, inputs, strict=True) if name}
    ends = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, names, ends, domain=domain, **(attributes or {}))
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in values.items()],
        [onnx.ValueInfoProto(name=name) for name in ends],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=8), values


def checked(
    op_type: str, opset: int, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None,
    constants: Collection[int] = (), outputs: int = 1,
) -> Any:  # fmt: skip
    """What is made of a node, None too, seen to compute what onnxruntime does, which has to run the node."""
    model, values = one_node(op_type, opset, inputs, attributes, outputs)
    node = model.graph.node[0]
    wanted = runtime_outputs(model, values)
    assert wanted is not None, "onnxruntime does not run this node"
    view = view_of(node, opset, values, constants)
    made = make(view, key_of(node))
    if made is not None:
        for found, expected in zip(call(made, view, node, values), wanted, strict=True):
            assert_same(found, expected)
    return made
