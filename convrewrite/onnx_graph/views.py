"""The nodes of a graph as makers of modules see them, and which values are constant."""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from convrewrite.onnx_graph.file import NodeView, OnnxFile
from convrewrite.onnx_graph.walks import inner_graphs

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
"""Operators that give other values at every call, or may."""

NO_TENSORS = (
    "Optional",
    "OptionalGetElement",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceInsert",
    "SplitToSequence",
)
"""Operators whose outputs no graph can store as constants; they are left out where a session refuses them as outputs."""

TYPE_FROM = ("CastLike",)
"""Operators that take only the type from their second input: its numbers change nothing. The new exporter of torch writes the
zeros of a missing bias so, unless it optimises."""

_KINDS = onnx.AttributeProto
ABSENT = (
    _KINDS.GRAPH, _KINDS.GRAPHS, _KINDS.SPARSE_TENSOR, _KINDS.SPARSE_TENSORS, _KINDS.TYPE_PROTO, _KINDS.TYPE_PROTOS,
)  # fmt: skip
"""Types of attributes that a view leaves out."""


def names_used(node: onnx.NodeProto) -> Iterator[str]:
    """The values a node takes, including those that the graphs inside of it take from outside."""
    yield from filter(None, node.input)
    for graph in inner_graphs(node):
        inner = {entry.name for entry in (*graph.input, *graph.initializer)}
        inner |= {sparse.values.name for sparse in graph.sparse_initializer}
        inner |= {name for one in graph.node for name in one.output}
        for one in graph.node:
            yield from (name for name in names_used(one) if name not in inner)
        yield from (entry.name for entry in graph.output if entry.name not in inner)


def outputs_of(node: onnx.NodeProto) -> list[str]:
    """The outputs of a node without names "" at the end, which mean the same as no names there."""
    names = list(node.output)
    while len(names) > 1 and not names[-1]:
        names.pop()
    return names


class Constants:
    """The values of a graph that no input changes."""

    def __init__(
        self, file: OnnxFile, inputs: Collection[str], held: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """``inputs`` are those that are given at every run; ``held`` those that are the same in every run here. ``from_held``
        are the constants that depend on held ones: users of the graph may give others, so none may be written into it."""
        self._file = file
        self._values: dict[str, Any] = {name: tensor.numpy() for name, tensor in held.items()}
        self._initialisers = {one.name: one for one in file.model.graph.initializer if one.name not in inputs}
        self._sparse = dict(sparse_values(file.model.graph))
        stored = {*self._initialisers, *self._sparse}
        self.names = _with_computed(file.model.graph, {*stored, *held})
        self.from_held = self.names - _with_computed(file.model.graph, stored)

    def learn(self, values: Mapping[str, Any]) -> None:
        """Take from a run the constants that nodes compute."""
        self._values |= {name: value for name, value in values.items() if name in self.names}

    def array(self, name: str) -> Any:
        """The numbers, as the graph has them; None for what is no tensor."""
        if name in self._initialisers:
            return self._file.array(self._initialisers[name])
        if name in self._sparse and name not in self._values:
            self._values[name] = _dense(self._sparse[name], self._file)
        return self._values.get(name)

    def initialiser(self, name: str) -> onnx.TensorProto | None:
        """As the file stores it; None for what nodes compute."""
        return self._initialisers.get(name)

    def tensor(self, name: str) -> Tensor | None:
        """As modules hold it; None where it is not constant, or of a type that torch does not have."""
        return as_tensor(self.array(name)) if name in self.names else None


def sparse_values(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.SparseTensorProto]]:
    """The values of which a graph stores only the entries that are not zero, by name."""
    for sparse in graph.sparse_initializer:
        yield sparse.values.name, sparse
    for node in graph.node:
        yield from ((node.output[0], one.sparse_tensor) for one in node.attribute if one.name == "sparse_value")


def _with_computed(graph: onnx.GraphProto, names: Collection[str]) -> set[str]:
    """``names``, and what nodes compute from these alone."""
    found = set(names)
    for node in graph.node:
        read = node.input[:1] if node.op_type in TYPE_FROM else names_used(node)
        if node.op_type not in (*RANDOM, *NO_TENSORS) and all(name in found for name in read):
            found.update(filter(None, node.output))
    return found


def _dense(sparse: onnx.SparseTensorProto, file: OnnxFile) -> NDArray[Any]:
    """All numbers: indices count through the whole tensor, or are one for each axis."""
    values, places = file.array(sparse.values), file.array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    dense[np.unravel_index(places, dense.shape) if places.ndim == 1 else tuple(places.T)] = values
    return dense


def as_tensor(value: Any) -> Tensor | None:
    """An array as a tensor of its own, half precision as float32; None for what is no array of numbers."""
    if not isinstance(value, np.ndarray):
        return None
    if value.dtype.name in ("float16", "bfloat16"):
        return torch.from_numpy(value.astype(np.float32))
    if value.dtype.kind not in "fiub" or value.dtype.itemsize == 0:
        return None
    try:
        return torch.from_numpy(np.array(value).view(value.dtype.name))  # numpy has two types of one name
    except TypeError:  # a type that torch does not have, such as one of four bits
        return None


def view_of(node: onnx.NodeProto, file: OnnxFile, constants: Constants, ranks: Mapping[str, int]) -> NodeView | None:
    """A node for its maker; None where a constant among its inputs is of no type that torch has."""
    held = tuple(constants.tensor(name) if name else None for name in node.input)
    if any(value is None and name in constants.names for name, value in zip(node.input, held, strict=True)):
        return None
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    attributes = {one.name: _attribute(one, file) for one in node.attribute if one.type not in ABSENT}
    found = [ranks.get(name) if one is None else one.dim() for name, one in zip(node.input, held, strict=True)]
    return NodeView(
        f"{domain}{node.op_type}", file.opset, attributes, held, tuple(bool(name) for name in node.input), tuple(found),
        tuple(bool(name) for name in outputs_of(node)),
    )  # fmt: skip


def _attribute(attribute: onnx.AttributeProto, file: OnnxFile) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, onnx.TensorProto):
        return as_tensor(file.array(value))
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [text.decode("utf-8", "replace") for text in value]
    return list(value) if not isinstance(value, int | float | str) else value
