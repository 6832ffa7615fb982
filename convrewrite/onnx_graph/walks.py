"""Everything that a model holds, wherever it lies: graphs inside of nodes, and names."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import onnx

STANDARD_DOMAINS = ("", "ai.onnx")
"""Names of the standard domain of operators: a file may use either."""


def graphs_of(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph of a model, those of its training, and all inside of their nodes."""
    waiting = [model.graph, *_training_graphs(model)]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [inner for node in graph.node for inner in inner_graphs(node)]


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that are attributes of a node: branches of an If, the body of a Loop or a Scan."""
    found: list[onnx.GraphProto] = []
    for attribute in node.attribute:
        found += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return found


def with_inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of the graphs inside of them."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [other for graph in inner_graphs(node) for other in graph.node]


def uses_of(model: onnx.ModelProto) -> Counter[str]:
    """How often each value is used: by nodes at any depth, as an output, by annotations, and in training.

    Functions are left out: they see only what they are given.
    """
    uses = _uses_in(graphs_of(model))
    for info in model.training_info:
        for entry in (*info.initialization_binding, *info.update_binding):
            uses.update((entry.key, entry.value))
    return uses


def uses_inside(node: onnx.NodeProto) -> Counter[str]:
    """How often the graphs inside of a node use each value, their own ones too."""
    graphs = inner_graphs(node)
    return _uses_in(
        [*graphs, *(deeper for graph in graphs for one in with_inner(graph.node) for deeper in inner_graphs(one))]
    )


def _uses_in(graphs: Iterable[onnx.GraphProto]) -> Counter[str]:
    uses: Counter[str] = Counter()
    for graph in graphs:
        uses.update(name for node in graph.node for name in node.input)
        uses.update(value.name for value in graph.output)
        for annotation in graph.quantization_annotation:
            uses.update(entry.value for entry in annotation.quant_parameter_tensor_names)
    return uses


def alone_uses(norm: onnx.NodeProto, uses: Mapping[str, int]) -> bool:
    """Whether a BatchNormalization works as in inference, and nothing else uses its input: then it can be folded."""
    return uses[norm.input[0]] == 1 and not any(uses[name] for name in norm.output[1:] if name)


class Names:
    """The names of a model, of values and of nodes, and new ones that none of them has."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Collect the names of all graphs, as inner ones see the names around them, and of functions, which may be inlined."""
        self._taken: set[str] = set()
        for graph in graphs_of(model):
            self._taken.update(tensor.name for tensor in graph.initializer)
            self._taken.update(sparse.values.name for sparse in graph.sparse_initializer)
            self._taken.update(value.name for value in (*graph.input, *graph.output, *graph.value_info))
        for node in _all_nodes(model):
            self._taken.update((node.name, *node.input, *node.output))

    def new(self, wanted: str) -> str:
        """``wanted`` where nothing has that name, otherwise with a number added; from then on it is taken."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def _training_graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    return [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graphs_of(model):
        yield from graph.node
    for function in model.functions:
        yield from with_inner(function.node)
