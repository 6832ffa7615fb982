"""Who measures time in a run, and the original that everything is timed against.

A :class:`Timer` is handed into a run; another one, of a test or of another machine, answers in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn

from convrewrite import values
from convrewrite.conv import ConvSpec, Size
from convrewrite.errors import PlanError
from convrewrite.inputs import Inputs
from convrewrite.runtime.exporting import Exporter, TorchExporter
from convrewrite.runtime.latency import Comparison, compare_onnx, compare_torch, time_onnx, time_options
from convrewrite.runtime.onnx_export import Exported
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.timing_cache import TimingCache


class Timer(Protocol):
    """Measures seconds, at so many ``threads``."""

    def compare_onnx(self, a: Path, b: Path, inputs: Inputs, threads: int) -> Comparison:
        """Two ONNX files on the same inputs."""

    def compare_torch(self, a: nn.Module, b: nn.Module, inputs: Inputs, threads: int) -> Comparison:
        """Two modules in eager torch."""

    def time_onnx(self, path: Path, inputs: Inputs, threads: int) -> float:
        """Seconds of one call of an ONNX file."""

    def time_options(
        self, original: ConvSpec, options: Sequence[OptionGraph], size: Size, threads: int, rounds: int
    ) -> tuple[float, list[float]]:
        """Seconds of a convolution on inputs of this size, and of every option in its place."""


@dataclass(frozen=True, slots=True)
class RuntimeTimer:
    """onnxruntime and torch on this machine. ``cache`` keeps the times of options; None: the user's own."""

    cache: TimingCache | None = None
    lasting: ClassVar[bool] = True
    """Whether what was measured once may be kept from run to run, as any other timer does not say."""

    def compare_onnx(self, a: Path, b: Path, inputs: Inputs, threads: int) -> Comparison:
        """See :class:`Timer`."""
        return compare_onnx(a, b, inputs, threads=threads)

    def compare_torch(self, a: nn.Module, b: nn.Module, inputs: Inputs, threads: int) -> Comparison:
        """See :class:`Timer`."""
        return compare_torch(a, b, inputs, threads=threads)

    def time_onnx(self, path: Path, inputs: Inputs, threads: int) -> float:
        """See :class:`Timer`."""
        return time_onnx(path, inputs, threads=threads)

    def time_options(
        self, original: ConvSpec, options: Sequence[OptionGraph], size: Size, threads: int, rounds: int
    ) -> tuple[float, list[float]]:
        """See :class:`Timer`."""
        return time_options(original, options, size, threads=threads, rounds=rounds, cache=self.cache or TimingCache())


THIS_MACHINE = RuntimeTimer()


@dataclass(frozen=True, slots=True)
class Baseline:
    """The original's ONNX file, the inputs on which it is timed, a folder for what is timed against it, and who makes files."""

    original: Exported
    inputs: Inputs
    folder: Path
    timer: Timer
    threads: int
    exporter: Exporter

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Inputs,
        folder: Path,
        timer: Timer,
        threads: int,
        exporter: Exporter | None = None,
    ) -> "Baseline":
        """The original exported into this folder. Raises ExportError for one that onnxruntime cannot run."""
        how = exporter or TorchExporter()
        return cls(how.original(model, inputs, folder / "original.onnx"), inputs, folder, timer, threads, how)

    @property
    def result(self) -> Path:
        """Where the rewritten model is exported to."""
        return self.folder / "model.onnx"

    def seconds(self) -> float:
        """Of the original, for one example."""
        one = self._one(self.original.dynamic_batch)
        seconds = self.timer.time_onnx(self.original.path, self.exporter.feed(one), self.threads)
        return seconds / len(one[0])

    def ratio(self, model: nn.Module) -> float:
        """The time of another model as a part of the original's: the median of paired ratios."""
        trial = self.exporter.rewritten(model, self.inputs, self.folder / "unfitted.onnx", {})
        one = self._one(self.original.dynamic_batch and trial.dynamic_batch)
        return self.timer.compare_onnx(self.original.path, trial.path, self.exporter.feed(one), self.threads).ratio

    def _one(self, dynamic: bool) -> tuple[Tensor, ...]:
        return tuple(tensor[:1] for tensor in self.inputs) if dynamic else self.inputs


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """In place of a :class:`Baseline` where nothing is exported or timed."""

    def seconds(self) -> float:
        """Raises PlanError."""
        raise PlanError(values.NEEDS_TIMES)

    def ratio(self, _model: nn.Module) -> float:
        """Raises PlanError."""
        raise PlanError(values.NEEDS_TIMES)
