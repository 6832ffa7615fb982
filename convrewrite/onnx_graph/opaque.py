"""Nodes that onnxruntime itself runs, inside of a module: whatever torch has no equal for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from convrewrite.modules import Operator, Shared
from convrewrite.onnx_graph.observing import session_of

HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
"""Types that a module holds in float32."""

NUMPY = {onnx.TensorProto.FLOAT16: np.float16}


class _Session(Shared):
    """A session that copies of a module share: it has no state."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self._session = session_of(model, folder)

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """All outputs."""
        return list(self._session.run(None, dict(feed)))

    @property
    def types(self) -> dict[str, str]:
        """Inputs and their types."""
        return {entry.name: entry.type for entry in self._session.get_inputs()}


class Region(Operator):
    """Nodes of an ONNX graph in a row, run by onnxruntime. No gradient passes.

    Takes tensors in the order of ``inputs``, gives one or a tuple of them in the order of ``outputs``. What the graph has in half
    precision comes and goes in float32.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path, operators: Sequence[str]) -> None:
        """``model`` holds the nodes alone. Raises what onnxruntime raises for one it cannot open."""
        super().__init__()
        self.operators = tuple(operators)
        self.inputs = tuple(entry.name for entry in model.graph.input)
        self.outputs = tuple(entry.name for entry in model.graph.output)
        self._session = _Session(model, folder)
        self._types = self._session.types

    def forward(self, *values: Any) -> Any:
        """The values of the outputs; lists for sequences."""
        given = dict(zip(self.inputs, values, strict=True))
        feed = {name: _to_numpy(given[name], kind) for name, kind in self._types.items()}
        found = tuple(_to_torch(value) for value in self._session.run(feed))
        return found[0] if len(found) == 1 else found

    def extra_repr(self) -> str:
        """The operators."""
        return ", ".join(self.operators)


def _to_numpy(value: Any, kind: str) -> Any:
    if isinstance(value, list | tuple):
        return [_to_numpy(part, kind) for part in value]
    if not isinstance(value, Tensor):
        return value
    array: Any = value.detach().cpu().contiguous().numpy()
    return array.astype(np.float16) if "float16)" in kind and array.dtype == np.float32 else array


def _to_torch(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_torch(part) for part in value]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return value  # of text
    tensor = torch.from_numpy(np.array(value)) if not value.flags.writeable else torch.from_numpy(value)
    return tensor.float() if tensor.dtype == torch.float16 else tensor
