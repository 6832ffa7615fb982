"""The operators of ONNX as functions and modules of torch.

``OPERATORS`` has for every operator known here a maker, under its name, or ``com.microsoft::`` and its name. A maker takes a
node and gives what computes it when called with the node's inputs that are no constants, or None where nothing here can.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.activations import ACTIVATIONS
from convrewrite.onnx_graph.operators.arithmetic import ARITHMETIC
from convrewrite.onnx_graph.operators.attention import ATTENTION
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker
from convrewrite.onnx_graph.operators.contractions import CONTRACTIONS
from convrewrite.onnx_graph.operators.filling import FILLING
from convrewrite.onnx_graph.operators.indexing import INDEXING
from convrewrite.onnx_graph.operators.normalisation import NORMALISATION
from convrewrite.onnx_graph.operators.padding import PADDING
from convrewrite.onnx_graph.operators.pooling import POOLING
from convrewrite.onnx_graph.operators.quantisation import QUANTISATION
from convrewrite.onnx_graph.operators.recurrent import RECURRENT_LAYERS
from convrewrite.onnx_graph.operators.reductions import REDUCTIONS
from convrewrite.onnx_graph.operators.resizing import RESIZING
from convrewrite.onnx_graph.operators.shapes import SHAPES

OLDEST_OPSET = 7
"""Versions of the standard operators below this one broadcast in another way, and onnxruntime does not run them."""


def _guarded(maker: Maker, view: NodeView) -> Made | None:
    """As ``maker``, but None for files that are too old, values that are no tensors, and attributes that break the standard."""
    no_tensor = any(present and rank is None for present, rank in zip(view.present, view.ranks, strict=True))
    if view.opset < OLDEST_OPSET or no_tensor:
        return None
    try:
        return maker(view)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError):
        return None


OPERATORS: Mapping[str, Maker] = MappingProxyType(
    {
        name: partial(_guarded, maker)
        for table in (
            ACTIVATIONS, ARITHMETIC, ATTENTION, CONTRACTIONS, FILLING, INDEXING, NORMALISATION, PADDING, POOLING, QUANTISATION,
            RECURRENT_LAYERS, REDUCTIONS, RESIZING, SHAPES,
        )
        for name, maker in table.items()
    }
)  # fmt: skip
"""Operators -> makers that never raise."""

__all__ = ["OPERATORS", "Computed", "Made", "Maker"]
