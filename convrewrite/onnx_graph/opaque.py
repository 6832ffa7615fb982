"""Nodes that onnxruntime itself runs, inside of a module: whatever torch has no equivalent for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from convrewrite.modules import Operator, Shared
from convrewrite.onnx_files import PATIENCE, run_within
from convrewrite.onnx_graph.observing import session_of
from convrewrite.values import PROBE_SECONDS

HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
"""Types that a module holds in float32."""

NAMED = 5
"""Most operators of a region that a message names."""

NUMPY = {onnx.TensorProto.FLOAT16: np.float16}


class _Session(Shared):
    """A session that copies of a module share: it has no state. ``seconds`` are what a run of it may take."""

    def __init__(self, model: onnx.ModelProto, folder: Path, seconds: float) -> None:
        self._session = session_of(model, folder)
        self._seconds = seconds

    def run(self, feed: Mapping[str, Any], where: str) -> list[Any]:
        """All outputs. Raises ModelLoadError, naming ``where``, for a run that does not end."""
        return run_within(self._session, None, feed, self._seconds, where)

    @property
    def types(self) -> dict[str, str]:
        """Inputs and their types."""
        return {entry.name: entry.type for entry in self._session.get_inputs()}


class Region(Operator):
    """Nodes of an ONNX graph in a row, run by onnxruntime. No gradient passes through.

    Takes tensors in the order of ``inputs``, gives one or a tuple of them in the order of ``outputs``. Values that the graph has
    in half precision are taken and given in float32.
    """

    def __init__(
        self, model: onnx.ModelProto, folder: Path, operators: Sequence[str], seconds: float = PATIENCE * PROBE_SECONDS
    ) -> None:
        """``model`` holds the nodes alone; ``seconds`` are what a run may take. Raises what onnxruntime raises for one it cannot
        open."""
        super().__init__()
        self.operators = tuple(operators)
        self.inputs = tuple(entry.name for entry in model.graph.input)
        self.outputs = tuple(entry.name for entry in model.graph.output)
        self._session = _Session(model, folder, seconds)
        self._types = self._session.types

    def forward(self, *values: Any) -> Any:
        """The values of the outputs; lists for sequences."""
        given = dict(zip(self.inputs, values, strict=True))
        feed = {name: _to_numpy(given[name], kind) for name, kind in self._types.items()}
        named = ", ".join(list(dict.fromkeys(self.operators))[:NAMED])
        where = f"the part of the graph that onnxruntime runs ({named})"
        found = tuple(_to_torch(value) for value in self._session.run(feed, where))
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
        return value  # text
    value = value.view(value.dtype.name)  # numpy has two types of one name, torch knows one
    tensor = torch.from_numpy(np.array(value)) if not value.flags.writeable else torch.from_numpy(value)
    return tensor.float() if tensor.dtype == torch.float16 else tensor
