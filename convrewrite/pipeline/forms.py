"""The forms besides ONNX that a result is written in, from its model and its ONNX file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from convrewrite.exports import Judged, Reference, Source, Written, in_slices, named_exports, rehearse, write_all
from convrewrite.inputs import Inputs
from convrewrite.meanings import Evaluation
from convrewrite.modules import preserved
from convrewrite.onnx_files import OnnxModel
from convrewrite.progress import Progress
from convrewrite.runtime import Exporter

SAMPLES = 2
"""Batches of inputs that show how large values become."""

FOLDER = "exports"
"""The folder in a run's temporary files where its forms lie until the result is saved."""


@dataclass(frozen=True, slots=True)
class Forms:
    """The forms, by ``names``, that a result is to be written in.

    ``original`` and ``inputs``: the model and an example for it; ``exporter``: makes ONNX files; ``onnx``: the original's file,
    where there is one; ``free_axes``: the axes that were asked for; ``batch``: how many examples a graph takes at a time.
    """

    names: tuple[str, ...]
    original: nn.Module
    inputs: Inputs
    exporter: Exporter
    onnx: Path | None
    free_axes: tuple[str, ...] | None
    batch: int | None = None

    def rehearse(self) -> None:
        """Raise UsageError or ExportError, before the long work, where the original cannot be written in these forms."""
        if self.names:
            rehearse(named_exports(self.names), self._source(self.original, self.onnx, (self.inputs,)))

    def write(
        self, rewritten: nn.Module, onnx: Path | None, evaluation: Evaluation, samples: Sequence[Inputs], place: Path,
        progress: Progress,
    ) -> tuple[Written, ...]:  # fmt: skip
        """Write all of them to a folder below ``place``. ``onnx``: the rewritten model's file; ``samples``: inputs such as it
        gets."""
        if not self.names:
            return ()
        batches, feed = evaluation.batches, self.exporter.feed
        few = (samples or evaluation.batches)[:SAMPLES]
        if self.exporter.exports:
            reference = Reference(rewritten, self.original, batches, evaluation.meanings, feed)
        else:
            assert onnx is not None and self.onnx is not None, "a graph is a file"
            reference = Reference(
                OnnxModel(onnx, trust=True), OnnxModel(self.onnx, trust=True), batches, evaluation.meanings, feed,
                self._judged(onnx, self.onnx),
            )  # fmt: skip
        folder = place / FOLDER
        folder.mkdir()
        with preserved(rewritten):
            return write_all(named_exports(self.names), self._source(rewritten, onnx, few), reference, folder, progress)

    def _judged(self, onnx: Path, original: Path) -> Judged | None:
        """None where the files' own outputs are those by which results are judged."""
        first = self.exporter.runner(onnx)
        if first.output_names == OnnxModel(onnx, trust=True).output_names:
            return None
        return Judged(first, self.exporter.runner(original), self.exporter.runner)

    def _source(self, model: nn.Module, onnx: Path | None, samples: Sequence[Inputs]) -> Source:
        module = model if self.exporter.exports else None
        batch = OnnxModel(onnx).batch if self.exporter.exports and onnx is not None else self.batch
        feed = self.exporter.feed  # after the slices: what it adds has no examples
        shown = tuple(map(feed, in_slices(samples, batch)))
        return Source(feed(self.inputs), module, onnx, batch, self.free_axes, shown)


def forms_of(
    names: tuple[str, ...],
    original: nn.Module,
    inputs: Inputs,
    exporter: Exporter,
    onnx: Path | None,
    free_axes: tuple[str, ...] | None,
) -> Forms:
    """The forms of a run; ``onnx``: the original's file where one was made. A graph has a file in any case."""
    if exporter.exports:
        return Forms(names, original, inputs, exporter, onnx, free_axes)
    came = exporter.original(original, inputs, Path())
    return Forms(names, original, inputs, exporter, came.path, free_axes, came.batch)
