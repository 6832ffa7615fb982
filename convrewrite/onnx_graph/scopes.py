"""Places of a model where nodes stand: its graph, the graphs inside of nodes, and functions where they are called.

Each is given with the shapes that are known in it: those of an example run in the main graph, and what onnx infers from them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx
from onnx import TensorProto

from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.small_constants import folded, small
from convrewrite.onnx_graph.walks import STANDARD_DOMAINS, inner_graphs, with_inner

Shape = tuple[int | None, ...]
"""Extents of a value; None for those that are not known."""

MOST_CALLS, DEEPEST = 4000, 64
"""Most calls of functions that are followed, and how deep: calls inside of functions multiply, and a file can be made so that
they have no end. Exporters make one call for each layer, two or three deep."""

SCAN_WITHOUT_BATCH = 9
"""Version of the standard operators from which a Scan has no batch of its own."""

FunctionId = tuple[str, str, str]
"""Domain, name and overload."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a value: ONNX's type of its elements (float32 where only the shape is known), and its shape."""

    kind: int
    shape: Shape | None


@dataclass(frozen=True, slots=True)
class Scope:
    """Nodes that see each other's values.

    Attributes:
        nodes: in order.
        values: what is known of the values they see.
        constants: the small ones among these, and those that nodes compute from them.
        names: of the nodes in which this place lies, outermost first; empty for the main graph.
        container: what it lies in, in words; empty for the main graph.
        opsets: the versions of the operators here.
    """

    nodes: Sequence[onnx.NodeProto]
    values: Mapping[str, Known]
    constants: Mapping[str, TensorProto] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    container: str = ""
    opsets: Sequence[onnx.OperatorSetIdProto] = ()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a value; None where any of it is not known."""
        known = self.values.get(name)
        if known is None or known.shape is None:
            return None
        extents = tuple(extent for extent in known.shape if extent is not None)
        return extents if len(extents) == len(known.shape) else None


class Scopes:
    """All places of a model that have a node for which ``sought`` is true."""

    def __init__(
        self, file: OnnxFile, sizes: Mapping[str, tuple[int, ...]], sought: Callable[[onnx.NodeProto], bool]
    ) -> None:
        """``sizes`` are the shapes of values of the main graph in an example run."""
        self._model, self._sizes, self._sought = file.model, sizes, sought
        self._functions = _functions_of(file.model)
        self._shown = _shown(file.model)
        self._seeking: set[FunctionId] = set()
        for _ in range(DEEPEST):
            before, self._seeking = self._seeking, self._functions_that_seek()
            if before == self._seeking:
                break
        self._calls = 0

    def __iter__(self) -> Iterator[Scope]:
        """The main graph first, and every other after the one around it."""
        graph = self._model.graph
        waiting = [
            Scope(graph.node, self._sized(_declared(graph)), small(graph.initializer), opsets=self._model.opset_import)
        ]
        while waiting:
            scope = waiting.pop()
            if not self._seeks(scope.nodes):
                continue
            more = folded(scope.nodes, scope.constants, scope.opsets)
            known = {name: Known(tensor.data_type, tuple(tensor.dims)) for name, tensor in more.items()}
            scope = replace(scope, constants={**scope.constants, **more}, values={**scope.values, **known})
            scope = replace(scope, values=self._inferred(scope))
            yield scope
            waiting += reversed([inner for node in scope.nodes for inner in self._inside(scope, node)])

    def _sized(self, values: Mapping[str, Known]) -> dict[str, Known]:
        """``values`` with the shapes of the example run, where there are any."""
        unknown = Known(TensorProto.FLOAT, None)
        found = {name: replace(values.get(name, unknown), shape=tuple(shape)) for name, shape in self._sizes.items()}
        return {**values, **found}

    def _inferred(self, scope: Scope) -> dict[str, Known]:
        """What is known, and what onnx infers from it."""
        return {**scope.values, **_inferred(scope, self._model.ir_version, self._shown)}

    def _inside(self, scope: Scope, node: onnx.NodeProto) -> Iterator[Scope]:
        """The places inside of a node: graphs that it holds, and the function that it calls."""
        name = node.name or next(iter(node.output), "")
        names = (*scope.names, name)
        for graph in inner_graphs(node):
            values = {**scope.values, **_declared(graph), **_given(scope, node, graph)}
            constants = {**scope.constants, **small(graph.initializer)}
            container = f"the {node.op_type} {name}"
            yield replace(scope, nodes=graph.node, values=values, constants=constants, names=names, container=container)
        function = self._functions.get(_id(node.domain, node.op_type, node.overload))
        if function is None or self._calls >= MOST_CALLS or len(scope.names) >= DEEPEST:
            return
        self._calls += 1
        actual = dict(zip(function.input, node.input, strict=False))
        yield Scope(
            _with_attributes(function, node),
            {formal: scope.values[name] for formal, name in actual.items() if name in scope.values},
            {formal: scope.constants[name] for formal, name in actual.items() if name in scope.constants},
            names, f"the function {function.name} (called by {name})", function.opset_import,
        )  # fmt: skip

    def _seeks(self, nodes: Iterable[onnx.NodeProto]) -> bool:
        return any(
            self._sought(node) or _id(node.domain, node.op_type, node.overload) in self._seeking
            for node in with_inner(nodes)
        )

    def _functions_that_seek(self) -> set[FunctionId]:
        """Functions with a node that is sought, or that calls a function already known to have one."""
        return {key for key, function in self._functions.items() if self._seeks(function.node)}


def inferred_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's types of the values that nodes of the main graph make, as far as onnx can tell."""
    graph = model.graph
    scope = Scope(graph.node, _declared(graph), small(graph.initializer), opsets=model.opset_import)
    return {name: value.kind for name, value in _inferred(scope, model.ir_version, _shown(model)).items()}


def _inferred(scope: Scope, ir_version: int, functions: Mapping[FunctionId, onnx.FunctionProto]) -> dict[str, Known]:
    light = _light_model(scope)
    light.ir_version = ir_version
    if any(_id(node.domain, node.op_type, node.overload) in functions for node in with_inner(scope.nodes)):
        light.functions.extend(functions.values())
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except Exception:  # onnx raises errors of many kinds; what it cannot infer is not known then
        return {}
    return {value.name: _known(value) for value in inferred.graph.value_info}


def _functions_of(model: onnx.ModelProto) -> dict[FunctionId, onnx.FunctionProto]:
    return {_id(function.domain, function.name, function.overload): function for function in model.functions}


def _shown(model: onnx.ModelProto) -> dict[FunctionId, onnx.FunctionProto]:
    """The functions of a model for onnx's inference, which follows every call: none where there are too many calls."""
    functions = _functions_of(model)
    calls = dict.fromkeys(functions, 0)
    for _ in range(DEEPEST):
        more = {key: _calls(function.node, calls) for key, function in functions.items()}
        if more == calls:
            return functions if _calls(model.graph.node, calls) < MOST_CALLS else {}
        calls = more
    return {}


def _calls(nodes: Iterable[onnx.NodeProto], within: Mapping[FunctionId, int]) -> int:
    """How many calls nodes make, including the calls inside of the functions they call; at most MOST_CALLS."""
    called = (_id(node.domain, node.op_type, node.overload) for node in with_inner(nodes))
    return min(sum(1 + within[key] for key in called if key in within), MOST_CALLS)


def _id(domain: str, name: str, overload: str) -> FunctionId:
    return ("" if domain in STANDARD_DOMAINS else domain, name, overload)


def _known(value: onnx.ValueInfoProto) -> Known:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return Known(kind.elem_type, None)
    return Known(kind.elem_type, tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim))


def _declared(graph: onnx.GraphProto) -> dict[str, Known]:
    """What a graph itself says of its values."""
    found = {value.name: _known(value) for value in (*graph.value_info, *graph.output, *graph.input)}
    tensors = [(tensor.name, tensor.data_type, tensor.dims) for tensor in graph.initializer]
    tensors += [(sparse.values.name, sparse.values.data_type, sparse.dims) for sparse in graph.sparse_initializer]
    return {**found, **{name: Known(kind, tuple(dims)) for name, kind, dims in tensors}}


def _given(scope: Scope, node: onnx.NodeProto, graph: onnx.GraphProto) -> dict[str, Known]:
    """What a Loop or a Scan gives to its body at first."""
    names = [value.name for value in graph.input]
    unknown = Known(TensorProto.FLOAT, None)
    if node.op_type == "Loop":
        values = [Known(TensorProto.INT64, ()), Known(TensorProto.BOOL, ())]
        values += [scope.values.get(name, unknown) for name in node.input[2:]]
    elif node.op_type == "Scan" and _version(scope) >= SCAN_WITHOUT_BATCH:
        integers = {attribute.name: attribute for attribute in node.attribute}
        scanned = integers["num_scan_inputs"].i if "num_scan_inputs" in integers else 0
        axes = list(integers["scan_input_axes"].ints) if "scan_input_axes" in integers else [0] * scanned
        values = [scope.values.get(name, unknown) for name in node.input]
        first = len(values) - scanned
        values[first:] = [_without(value, axis) for value, axis in zip(values[first:], axes, strict=False)]
    else:
        return {}
    pairs = zip(names, values, strict=False)
    return {name: value for name, value in pairs if value.shape is not None}


def _version(scope: Scope) -> int:
    return max((entry.version for entry in scope.opsets if entry.domain in STANDARD_DOMAINS), default=1)


def _without(value: Known, axis: int) -> Known:
    """One slice of a value."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return replace(value, shape=None)
    extents = list(value.shape)
    del extents[axis]
    return replace(value, shape=tuple(extents))


def _with_attributes(function: onnx.FunctionProto, call: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes of a function; attributes that refer to the function's own have the values that a call gives."""
    values = {attribute.name: attribute for attribute in (*function.attribute_proto, *call.attribute)}
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in function.node]
    for node in with_inner(nodes):
        for number in reversed(range(len(node.attribute))):
            attribute = node.attribute[number]
            if not attribute.ref_attr_name:
                continue
            value = values.get(attribute.ref_attr_name)
            if value is None:  # it was left out: the operator has a default
                del node.attribute[number]
                continue
            name = attribute.name
            attribute.CopyFrom(value)
            attribute.name = name
    return nodes


def _light_model(scope: Scope) -> onnx.ModelProto:
    """A model of a scope alone, for inference: all that it sees from outside, except small constants, is an input without
    numbers."""
    light = onnx.ModelProto(opset_import=scope.opsets)
    graph = light.graph
    graph.name = "scope"
    nodes = [node for node in scope.nodes if not all(name in scope.constants for name in node.output)]
    graph.node.extend(nodes)
    made = {name for node in nodes for name in node.output}
    seen = {name for node in with_inner(nodes) for name in node.input}
    for name in sorted(seen | made):
        value = scope.values.get(name)
        if name in scope.constants and name not in made:
            graph.initializer.add().CopyFrom(scope.constants[name])
            graph.initializer[-1].name = name
        elif value is not None and value.shape is not None:
            place = graph.value_info if name in made else graph.input
            place.append(onnx.helper.make_tensor_value_info(name, value.kind, value.shape))
    return light
