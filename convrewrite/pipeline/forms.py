"""The forms besides ONNX that a result is written in, from its model and its ONNX file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from convrewrite.exports import Reference, Source, Written, named_exports, rehearse, write_all
from convrewrite.inputs import Inputs
from convrewrite.meanings import Evaluation
from convrewrite.modules import preserved
from convrewrite.onnx_files import OnnxModel
from convrewrite.progress import Progress
from convrewrite.runtime import Exporter

SAMPLES = 2
"""Batches of inputs by which is told how large values become."""

FOLDER = "exports"
"""The folder in a run's temporary files where its forms lie until the result is saved."""


@dataclass(frozen=True, slots=True)
class Forms:
    """What a result is to be written in, by ``names``, and of what: the ``original``, an example of its inputs, who makes ONNX
    files, the original's where there is one, and the axes that were asked for."""

    names: tuple[str, ...]
    original: nn.Module
    inputs: Inputs
    exporter: Exporter
    onnx: Path | None
    free_axes: tuple[str, ...] | None

    def rehearse(self) -> None:
        """Raise UsageError or ExportError where the original cannot be written so: before the long work."""
        if self.names:
            rehearse(named_exports(self.names), self._source(self.original, self.onnx))

    def write(
        self, rewritten: nn.Module, onnx: Path | None, evaluation: Evaluation, samples: Sequence[Inputs], place: Path,
        progress: Progress,
    ) -> tuple[Written, ...]:  # fmt: skip
        """All of them, in a folder below ``place``. ``onnx``: the rewritten model's file; ``samples``: inputs such as it gets."""
        if not self.names:
            return ()
        batches = tuple(self.exporter.feed(batch) for batch in evaluation.batches)
        few = tuple(self.exporter.feed(batch) for batch in (samples or evaluation.batches)[:SAMPLES])
        if self.exporter.exports:
            reference = Reference(rewritten, self.original, batches, evaluation.meanings)
        else:
            assert onnx is not None and self.onnx is not None, "a graph is a file"
            reference = Reference(
                OnnxModel(onnx, trust=True), OnnxModel(self.onnx, trust=True), batches, evaluation.meanings
            )
        folder = place / FOLDER
        folder.mkdir()
        with preserved(rewritten):
            return write_all(named_exports(self.names), self._source(rewritten, onnx, few), reference, folder, progress)

    def _source(self, model: nn.Module, onnx: Path | None, samples: tuple[Inputs, ...] = ()) -> Source:
        module = model if self.exporter.exports else None
        return Source(self.exporter.feed(self.inputs), module, onnx, self.free_axes, samples)


def forms_of(
    names: tuple[str, ...],
    original: nn.Module,
    inputs: Inputs,
    exporter: Exporter,
    onnx: Path | None,
    free_axes: tuple[str, ...] | None,
) -> Forms:
    """The forms of a run; ``onnx``: the original's file where one was made. That of a graph is there in any case."""
    came = onnx if exporter.exports else exporter.original(original, inputs, Path()).path
    return Forms(names, original, inputs, exporter, came, free_axes)
