"""An ONNX graph as a module, and surgery on that graph."""

from convrewrite.onnx_graph.file import OnnxFile

__all__ = ["OnnxFile"]
