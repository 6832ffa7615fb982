"""An ONNX graph as a module, and surgery on that graph."""

from convrewrite.onnx_graph.network import Network, hidden_cost, kept_sites, read_network
from convrewrite.onnx_graph.translating import batch_of, is_graph
from convrewrite.onnx_graph.writing import exporter_of

__all__ = ["Network", "batch_of", "exporter_of", "hidden_cost", "is_graph", "kept_sites", "read_network"]
