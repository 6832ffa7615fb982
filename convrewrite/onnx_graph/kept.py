"""Convolutions of a file that cannot be rewritten, each with its geometry, its cost where that is known, and the reason."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from convrewrite.conv import ConvSpec, Cost, Size
from convrewrite.onnx_graph.emission import DTYPES
from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.node_specs import ConvOperator, geometry
from convrewrite.onnx_graph.ordering import leading_to, makers_of
from convrewrite.onnx_graph.scopes import Scope, Scopes
from convrewrite.onnx_graph.walks import STANDARD_DOMAINS, inner_graphs, with_inner

LONGEST_NAME = 120
"""Most characters of a name that are shown: nodes inside of others have long ones."""

MOST_ROWS = 4096
"""Most rows of one example that are counted: what a file states of values inside of nodes need not be true."""

QUANTISED = "quantised already, and whole numbers cannot be fitted; rewrite the float model, then quantise the result"
FUSED = "fused by onnxruntime with what follows it; rewrite the model as it was before onnxruntime optimised it"
LAID_OUT = "laid out by onnxruntime for one processor; rewrite the model as it was before onnxruntime optimised it"
DEFORMABLE = "deformable: where its kernel looks depends on the input, so no other has the same effect"
MOVING = "its padding is computed while the model runs; export the model with a constant padding"
COMPUTED = "its weights are computed from the model's inputs, so there are none that could be rewritten"
CONSTANT = "no input of the model changes what it gives; fold constants first, and it is gone"
HELD = (
    "no input with examples changes what it gives, so nothing can be fitted to it; export the model with examples along the "
    "first axis of what it takes"
)
WITHOUT_EXAMPLES = (
    "the first axis of the model's inputs does not count examples, as it gets no row of its own for each; export the model with "
    "an axis of examples in front of all others"
)
UNUSED = "no output of the model depends on it, and it is never run; simplify the model first, and it is gone"
BEHIND = (
    "what it takes is chosen by numbers (detections): two models choose differently, so nothing can be fitted to it; cut the "
    "model in two there, and rewrite the second part by itself"
)
BROKEN = "its weight or bias holds NaN or infinity; export the model from a state before its training went wrong"
OPAQUE = (
    "in a part of the graph that is run by onnxruntime, as torch does not compute it alike; export the model with standard "
    "operators, or simplify it first"
)

CUT_UNEVENLY = (
    "transposed, and cut to an output_shape, by auto_pad, or more at one end than at the other, as no layer of torch is; export "
    "the model with pads that are the same at both ends, and output_padding"
)

_PLAIN = {"Conv": ConvOperator(), "ConvTranspose": ConvOperator(transposed=True)}

_OTHERS: dict[tuple[str, str], tuple[ConvOperator, str]] = {
    ("", "QLinearConv"): (ConvOperator(3, 8), QUANTISED),
    ("", "ConvInteger"): (ConvOperator(1, None), QUANTISED),
    ("", "DeformConv"): (ConvOperator(1, 3), DEFORMABLE),
    ("com.microsoft", "QLinearConv"): (ConvOperator(3, 8), QUANTISED),
    ("com.microsoft", "FusedConv"): (ConvOperator(), FUSED),
    ("com.microsoft", "NhwcFusedConv"): (ConvOperator(channels_last=True), FUSED),
    ("com.microsoft", "NhwcConv"): (ConvOperator(channels_last=True), LAID_OUT),
    ("com.microsoft", "ConvTransposeWithDynamicPads"): (ConvOperator(1, 3, transposed=True), MOVING),
    ("com.microsoft.nchwc", "Conv"): (ConvOperator(None), LAID_OUT),
    ("com.ms.internal.nhwc", "Conv"): (ConvOperator(None), LAID_OUT),
    ("com.ms.internal.nhwc", "ConvTranspose"): (ConvOperator(None), LAID_OUT),
    ("com.ms.internal.nhwc", "QLinearConv"): (ConvOperator(None), QUANTISED),
    ("com.ms.internal.nhwc", "QLinearConvTranspose"): (ConvOperator(None), QUANTISED),
}
"""Domain and name -> how the operator takes its weight, and why it stays."""

_REMEDIES = {
    "If": "export the model without it, or make its condition a constant and simplify the model first",
    "Loop": "export the model with the loop unrolled",
    "Scan": "export the model with the loop unrolled",
}
"""Operators that hold graphs -> what to do about them."""

_INLINE = "inline the functions of the model first (onnx.inliner.inline_local_functions)"


@dataclass(frozen=True, slots=True)
class KeptConv:
    """A convolution that stays as it is.

    Attributes:
        name: of its node and those around it: letters, digits and ``_``, different from all others here.
        op_type: the operator.
        spec: its geometry, None where it is not known.
        input_sizes: height and width of its input for one example, once for each row that an example has there; empty where they
            are not known, or where it is never run.
        reason: why it stays, and what to do if it should not.
    """

    name: str
    op_type: str
    spec: ConvSpec | None
    input_sizes: tuple[Size, ...]
    reason: str

    @property
    def cost(self) -> Cost | None:
        """Parameters, and MACs of one example, of one run of it; None where geometry or size is not known."""
        return self.spec.cost(self.input_sizes) if self.spec is not None and self.input_sizes else None


def kept_convolutions(
    file: OnnxFile,
    sizes: Mapping[str, tuple[int, ...]],
    sites: Collection[int] | None = None,
    judged: Collection[str] = (),
    examples: int = 1,
    held: Collection[str] = (),
    taken: Collection[str] = (),
) -> tuple[KeptConv, ...]:
    """The convolutions of a file that cannot become sites, those of the main graph first.

    ``sizes`` are the shapes of values of the main graph in a run on so many ``examples``; inside of nodes and functions they are
    inferred. A function's convolution is listed once for each call. ``sites`` are the positions of the nodes that did become
    sites, where that is known: every other Conv of the main graph is kept then. ``judged`` are the values from which these were
    found, if they are not the outputs; ``held`` the inputs that have no examples; ``taken`` the names that sites have.
    """
    main = dict(_main_reasons(file, sites, judged, held))
    if not main and not file.model.functions and not any(map(inner_graphs, file.model.graph.node)):
        return ()  # nothing has to be inferred
    names = set(taken)
    found: list[KeptConv] = []
    for scope in Scopes(file, sizes, lambda node: _operator(node) is not None):
        reasons = dict(_inner_reasons(scope)) if scope.names else main
        for number, reason in reasons.items():
            node = scope.nodes[number]
            operator = _operator(node)
            if operator is not None:
                weight = None if operator.weight is None else scope.shape(_input(node, operator.weight))
                source = scope.shape(_input(node, 0))
                spec, input_sizes = geometry(node, operator, weight, source)
                input_sizes = () if reason == UNUSED else input_sizes * _rows(source, examples)
                found.append(KeptConv(_name(scope, node, names), node.op_type, spec, input_sizes, reason))
    return tuple(found)


def _rows(source: Sequence[int] | None, examples: int) -> int:
    """How many rows of a convolution's input are of one example: windows and frames of it stand along the first axis, too."""
    return min(max(1, source[0] // examples), MOST_ROWS) if source else 1


def _operator(node: onnx.NodeProto) -> ConvOperator | None:
    """How a node takes its weight; None for one that does not convolve."""
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    if domain == "" and node.op_type in _PLAIN:
        return _PLAIN[node.op_type]
    other = _OTHERS.get((domain, node.op_type))
    return None if other is None else other[0]


def _own_reason(node: onnx.NodeProto) -> str | None:
    """Why an operator stays wherever it is."""
    other = _OTHERS.get(("" if node.domain in STANDARD_DOMAINS else node.domain, node.op_type))
    return None if other is None else other[1]


def _inner_reasons(scope: Scope) -> Iterator[tuple[int, str]]:
    kind = scope.container.split(" ")[1]
    remedy = _INLINE if kind == "function" else _REMEDIES.get(kind, "export the model without that operator")
    for number, node in enumerate(scope.nodes):
        if _operator(node) is not None:
            yield number, _own_reason(node) or f"inside of {scope.container}, which stays as it is; {remedy}"


def _main_reasons(
    file: OnnxFile, sites: Collection[int] | None, judged: Collection[str], held: Collection[str]
) -> Iterator[tuple[int, str]]:
    graph, nodes = file.model.graph, file.model.graph.node
    computed, whole, makers = _computed(file), dequantised(file), makers_of(graph)
    from_examples = _computed(file, held) if held else computed
    used = leading_to(graph, makers, [entry.name for entry in graph.output])
    within = leading_to(graph, makers, judged) if judged else used
    for number, node in enumerate(nodes):
        operator = _operator(node)
        if operator is None or number in (sites or ()):
            continue
        weight = _input(node, 1)
        reason = UNUSED if number not in used else _own_reason(node)
        if reason is None and weight in computed:
            reason = COMPUTED
        elif reason is None and weight in whole:
            reason = QUANTISED
        elif reason is None and _input(node, 0) not in computed:
            reason = CONSTANT
        elif reason is None and _input(node, 0) not in from_examples:
            reason = HELD
        elif reason is None and sites is not None:
            reason = _opaque_reason(file, node) if number in within else BEHIND
        if reason is not None:
            yield number, reason


def _opaque_reason(file: OnnxFile, node: onnx.NodeProto) -> str:
    """Why a convolution that could have become a layer became none."""
    if not _is_finite(file, node.input[1:]):
        return BROKEN
    if node.op_type != "ConvTranspose":
        return OPAQUE
    given = {attribute.name: attribute for attribute in node.attribute}
    pads = list(given["pads"].ints) if "pads" in given else []
    automatic = "auto_pad" in given and given["auto_pad"].s.startswith(b"SAME")
    uneven = pads[: len(pads) // 2] != pads[len(pads) // 2 :]
    return CUT_UNEVENLY if "output_shape" in given or automatic or uneven else OPAQUE


def _is_finite(file: OnnxFile, names: Collection[str]) -> bool:
    """Whether those of the initialisers ``names`` that are real numbers hold neither NaN nor infinity."""
    held = [one for one in file.model.graph.initializer if one.name in names and one.data_type in DTYPES]
    return all(bool(np.isfinite(file.array(one)).all()) for one in held)


def _computed(file: OnnxFile, held: Collection[str] = ()) -> set[str]:
    """Values that depend on inputs of the model that are not ``held``. Inputs with a value of their own count as constants."""
    graph = file.model.graph
    constants = (
        set(held) | {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    )
    found = {value.name for value in graph.input} - constants
    return _reached(graph, found)


def dequantised(file: OnnxFile) -> set[str]:
    """The names of values that are computed from whole numbers."""
    graph = file.model.graph
    makers = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    return _reached(graph, {name for node in makers for name in node.output})


def _reached(graph: onnx.GraphProto, names: set[str]) -> set[str]:
    """``names``, and all values that are computed from them; nodes stand after those that they use."""
    found = set(names)
    for node in graph.node:
        inner = with_inner(other for held in inner_graphs(node) for other in held.node)
        if any(name in found for one in (node, *inner) for name in one.input):
            found.update(node.output)
    return found - {""}


def _input(node: onnx.NodeProto, position: int) -> str:
    return node.input[position] if len(node.input) > position else ""


def _name(scope: Scope, node: onnx.NodeProto, taken: set[str]) -> str:
    own = node.name or next(iter(node.output), "")
    text = "_".join(filter(None, (re.sub("[^0-9A-Za-z]+", "_", part).strip("_") for part in (*scope.names, own))))
    wanted = text[-LONGEST_NAME:].strip("_") or node.op_type
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name
