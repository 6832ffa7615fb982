"""How a run gets ONNX files of the original and of what it is rewritten to.

A module of torch is exported. For a module that was made of an ONNX graph, another :class:`Exporter` puts what was rewritten into
that graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from convrewrite.axes import beyond_batch
from convrewrite.inputs import Inputs
from convrewrite.onnx_files import OnnxModel
from convrewrite.runtime.onnx_export import Exported, export, require_runtime_dtype


class Exporter(Protocol):
    """Gives the files. ``exports`` says whether torch makes them; otherwise a file came in, and a file of it goes out. ``beyond``
    names the axes besides the batch that files take in any size."""

    @property
    def exports(self) -> bool:
        """See above."""

    @property
    def beyond(self) -> tuple[str, ...]:
        """See above."""

    def original(self, model: nn.Module, inputs: Inputs, path: Path) -> Exported:
        """The original's file, at ``path`` or where it lies already."""

    def rewritten(self, model: nn.Module, inputs: Inputs, path: Path, metadata: Mapping[str, str]) -> Exported:
        """A file of a rewritten model at ``path``, with these entries of metadata."""

    def runner(self, path: Path) -> OnnxModel:
        """A file in onnxruntime, giving the values by which results are judged."""

    def feed(self, inputs: Inputs) -> Inputs:
        """All inputs that the files take, given those of the model."""

    @property
    def source(self) -> str:
        """The digest of the file that came in; empty where none did."""

    def require_source(self) -> None:
        """Raise ModelLoadError where that file is another by now: what is measured on it, and made of it, would be false."""


@dataclass(frozen=True, slots=True)
class TorchExporter:
    """Exports modules of torch; ``opset`` and ``free_axes`` are as in :func:`convrewrite.export`."""

    opset: int | None = None
    free_axes: tuple[str, ...] | None = None

    @property
    def exports(self) -> bool:
        """True."""
        return True

    @property
    def source(self) -> str:
        """Empty: no file came in."""
        return ""

    def require_source(self) -> None:
        """Nothing to require."""

    @property
    def beyond(self) -> tuple[str, ...]:
        """What was asked for."""
        return beyond_batch(self.free_axes)

    def original(self, model: nn.Module, inputs: Inputs, path: Path) -> Exported:
        """Raises ExportError for a model that onnxruntime cannot run."""
        require_runtime_dtype(model)
        return export(model, inputs, path, opset=self.opset, free_axes=self.free_axes)

    def rewritten(self, model: nn.Module, inputs: Inputs, path: Path, metadata: Mapping[str, str]) -> Exported:
        """Raises ExportError."""
        return export(model, inputs, path, opset=self.opset, free_axes=self.free_axes, metadata=metadata)

    def runner(self, path: Path) -> OnnxModel:
        """The outputs are those of the model."""
        return OnnxModel(path)

    def feed(self, inputs: Inputs) -> Inputs:
        """The same."""
        return inputs
