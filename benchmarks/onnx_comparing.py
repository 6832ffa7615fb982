"""What an ONNX file holds, what it computes in onnxruntime, and by how much that differs from what another one computes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx_inputs import Inputs

CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv", "DeformConv")
"""Convolutions of every kind, also those that no rewriting takes: what a reader of the file would call one."""

ERRORS_ONLY = 3
"""The level of onnxruntime's messages: it warns in long lines of graphs whose names shadow others, and the like."""

HEARD = 1e-3
"""Inputs count as heard if they change the outputs by more than this, relative; with others a comparison says little."""

Values = Mapping[str, NDArray[Any]]
"""Values by their names."""


@dataclass(frozen=True, slots=True)
class Surveyed:
    """The version of the standard operators, the nodes of the main graph that are no constants, the convolutions in all
    graphs and at all calls of functions, and whether weights are in half precision."""

    opset: int
    nodes: int
    convolutions: int
    half: bool


def survey(path: Path) -> Surveyed:
    model = onnx.load(path, load_external_data=False)
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    computing = [node for node in model.graph.node if node.op_type != "Constant"]
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    functions = {(function.domain, function.name): function for function in model.functions}
    return Surveyed(opset, len(computing), convolutions(model.graph.node, functions), half)


def convolutions(nodes: Iterable[onnx.NodeProto], functions: Mapping[tuple[str, str], onnx.FunctionProto]) -> int:
    """Convolutions among these nodes, in their bodies, and at every call of a function."""
    count = 0
    for node in all_nodes(nodes):
        called = functions.get((node.domain, node.op_type))
        count += node.op_type in CONVOLUTIONS if called is None else convolutions(called.node, functions)
    return count


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These and the nodes of their bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from all_nodes(body.node)


def outputs_of(path: Path, inputs: Inputs, *, as_written: bool = False) -> Values:
    """What the file computes, in one thread; ``as_written``: node after node, as onnxruntime runs it without optimising it."""
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {entry.name: np.asarray(value) for entry, value in zip(session.get_outputs(), found, strict=True)}


def relative_error(before: Values, after: Values) -> float:
    """The greatest difference of an output, relative to its norm; of whole numbers the part that differ.

    Infinite where an output has another shape, or is no number where it was one.
    """
    if before.keys() != after.keys():
        return float("inf")
    return max((difference(value, after[name]) for name, value in before.items()), default=0.0)


def difference(before: NDArray[Any], after: NDArray[Any]) -> float:
    if before.shape != after.shape:
        return float("inf")
    if before.size == 0:
        return 0.0
    if not np.issubdtype(before.dtype, np.floating):
        return float(np.mean(before != after))
    first, second = before.astype(np.float64), after.astype(np.float64)
    known = np.isfinite(first)
    if not np.array_equal(known, np.isfinite(second)):
        return float("inf")
    norm = float(np.linalg.norm(first[known]))
    return float(np.linalg.norm(first[known] - second[known])) / (norm or 1.0)
