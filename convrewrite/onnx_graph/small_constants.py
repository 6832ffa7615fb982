"""Small constants that nodes compute from each other: exporters write pads, axes and shapes as a dozen nodes, and onnx's
inference follows only some of these."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from convrewrite.onnx_graph.walks import STANDARD_DOMAINS

SMALL = 1024
"""Most bytes of a constant that is looked at: shapes and axes are that small, weights seldom are."""

SHAPERS = (
    "Constant", "ConstantOfShape", "Identity", "Cast", "Concat", "Reshape", "Transpose", "Slice", "Gather", "Squeeze",
    "Unsqueeze",
)  # fmt: skip
"""Operators that compute shapes and pads. Their outputs are not much larger than their inputs."""


def small(tensors: Iterable[TensorProto]) -> dict[str, TensorProto]:
    """The small ones among tensors that lie in the model itself, by name."""
    inline = (tensor for tensor in tensors if tensor.data_location != TensorProto.EXTERNAL)
    return {
        tensor.name: tensor for tensor in inline if len(tensor.raw_data) <= SMALL and tensor.ByteSize() <= 2 * SMALL
    }


def folded(
    nodes: Sequence[onnx.NodeProto], constants: Mapping[str, TensorProto], opsets: Iterable[onnx.OperatorSetIdProto]
) -> dict[str, TensorProto]:
    """The small constants that nodes compute from others, by name; ``constants`` are those that are known already."""
    standard = [entry for entry in opsets if entry.domain in STANDARD_DOMAINS]
    known = dict(constants)
    for node in nodes:
        if node.op_type in SHAPERS and node.domain in STANDARD_DOMAINS and all(n in known for n in node.input if n):
            made = _computed(node, known, standard)
            if made is not None:
                known[made.name] = made
    return {name: tensor for name, tensor in known.items() if name not in constants}


def _computed(
    node: onnx.NodeProto, known: Mapping[str, TensorProto], opsets: list[onnx.OperatorSetIdProto]
) -> TensorProto | None:
    """What a node makes of constants; None where that is large, or where the node is not valid for its operator."""
    given = {name: known[name] for name in node.input if name}
    held = [attribute.t for attribute in node.attribute if attribute.HasField("t")]
    if len(node.output) != 1 or (held and not small(held)):
        return None
    try:
        arrays = {name: numpy_helper.to_array(tensor) for name, tensor in given.items()}
        if node.op_type == "ConstantOfShape" and math.prod(arrays[node.input[0]].tolist()) > SMALL:
            return None
        graph = onnx.helper.make_graph(
            [node], "one", [onnx.helper.make_empty_tensor_value_info(name) for name in arrays],
            [onnx.helper.make_empty_tensor_value_info(node.output[0])],
        )  # fmt: skip
        evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
        array: object = next(iter(evaluator.run(None, arrays)))
        if not isinstance(array, np.ndarray | np.generic) or array.nbytes > SMALL:
            return None
        return numpy_helper.from_array(np.asarray(array), node.output[0])
    except Exception:  # onnx raises errors of many kinds; what cannot be computed is not known then
        return None
