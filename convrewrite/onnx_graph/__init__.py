"""An ONNX graph as a module, and surgery on that graph."""

from convrewrite.onnx_graph.comparing import comparable
from convrewrite.onnx_graph.example_axis import ExampleAxis
from convrewrite.onnx_graph.examples import example_of_graph, noise_for
from convrewrite.onnx_graph.network import (
    Network,
    hidden_cost,
    holds_halves,
    kept_sites,
    read_network,
    refused_sites,
    regions_of,
    require_end,
)
from convrewrite.onnx_graph.opening import open_onnx
from convrewrite.onnx_graph.portable import PortableGraph
from convrewrite.onnx_graph.translating import batch_of, graph_inputs, is_graph, source_of_graph
from convrewrite.onnx_graph.writing import exporter_of, take_numbers

__all__ = [
    "ExampleAxis",
    "Network",
    "PortableGraph",
    "batch_of",
    "comparable",
    "example_of_graph",
    "exporter_of",
    "graph_inputs",
    "hidden_cost",
    "holds_halves",
    "is_graph",
    "kept_sites",
    "noise_for",
    "open_onnx",
    "read_network",
    "refused_sites",
    "regions_of",
    "require_end",
    "source_of_graph",
    "take_numbers",
]
