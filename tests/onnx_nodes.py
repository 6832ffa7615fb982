"""Single ONNX nodes: as makers see them, as onnxruntime computes them, and as what the makers make computes them."""

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


def as_tensor(value: Any) -> Tensor:
    """A constant or an input; half precision is computed in single."""
    value = np.asarray(value)
    return torch.from_numpy(value.astype(np.float32) if value.dtype in HALVES else np.ascontiguousarray(value).reshape(value.shape))


def attribute(proto: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(proto)
    if isinstance(value, onnx.TensorProto):
        return as_tensor(numpy_helper.to_array(value))
    if isinstance(value, list):
        return [part.decode() if isinstance(part, bytes) else part for part in value]
    return value.decode() if isinstance(value, bytes) else value


def view_of(
    node: onnx.NodeProto, opset: int, values: Mapping[str, Any], constants: Collection[int] = (), unused: Collection[int] = ()
) -> NodeView:
    """The node with the inputs at these positions as constants, and all outputs used but these."""
    here = [values.get(name) for name in node.input]
    tensors = [isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype != object for value in here]
    return NodeView(
        node.op_type,
        opset,
        {proto.name: attribute(proto) for proto in node.attribute if proto.type not in (5, 10)},
        tuple(as_tensor(v) if t and i in constants else None for i, (v, t) in enumerate(zip(here, tensors, strict=True))),
        tuple(bool(name) for name in node.input),
        tuple(np.asarray(v).ndim if t else None for v, t in zip(here, tensors, strict=True)),
        tuple(bool(name) and i not in unused for i, name in enumerate(node.output)),
    )


def key_of(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def make(view: NodeView, key: str = "") -> Any:
    return OPERATORS[key or view.op_type](view)


def call(made: Any, view: NodeView, node: onnx.NodeProto, values: Mapping[str, Any]) -> list[Any]:
    """What the made thing gives, one entry per output of the node."""
    given = [
        as_tensor(values[name]) for name, constant in zip(node.input, view.constants, strict=True) if name and constant is None
    ]
    result = made.eval()(*given) if isinstance(made, nn.Module) else made(*given)
    results = list(result) if isinstance(result, tuple) else [result]
    return [value for value, name in zip(results, node.output, strict=len(node.output) == 1) if name]


def runtime_outputs(model: onnx.ModelProto, values: Mapping[str, Any]) -> list[Any] | None:
    """What onnxruntime computes, nothing optimised away; None where it cannot run the model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, {entry.name: np.asarray(values[entry.name]) for entry in session.get_inputs()}))
    except Exception:  # onnxruntime's errors have no common type
        return None


def assert_same(found: Any, wanted: Any) -> None:
    """Alike in shape, type and numbers, to the precision of the type."""
    if found.is_floating_point() and not np.isfinite(found.numpy()).any() and np.asarray(wanted).size == 0:
        assert tuple(found.shape) == np.asarray(wanted).shape
    wanted = np.asarray(wanted)
    half = HALVES.get(wanted.dtype)
    expected = as_tensor(wanted)
    if half is not None:
        found, expected = found.to(half), expected.to(half)
    torch.testing.assert_close(found.detach(), expected, equal_nan=True)


def one_node(
    op_type: str, opset: int, inputs: Sequence[Any], attributes: Mapping[str, Any] | None = None, outputs: int = 1, domain: str = ""
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A model of one node, and what it is called with; an input of None is left out."""
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
