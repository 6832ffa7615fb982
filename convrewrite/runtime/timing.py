"""Who measures time in a run, and the original that everything is timed against.

A :class:`Timer` is handed into a run; another one, of a test or of another machine, answers in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import nn

from convrewrite import values
from convrewrite.conv import ConvSpec, Size
from convrewrite.errors import ConvRewriteError, ExportError, PlanError, UsageError
from convrewrite.escaping import one_line
from convrewrite.inputs import Inputs
from convrewrite.modules import eval_mode
from convrewrite.runtime.exporting import Exporter
from convrewrite.runtime.latency import (
    ONNXRUNTIME,
    PATIENCE,
    TORCH,
    compare_onnx,
    compare_torch,
    compiled,
    time_options,
    time_program,
    time_unit,
)
from convrewrite.runtime.onnx_export import Exported
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.timing_cache import TimingCache, runtime_of
from convrewrite.targets import Comparison, Program, Target


class Timer(Protocol):
    """Measures seconds, at so many ``threads``, in onnxruntime and torch, or in another target."""

    def on(self, target: Target) -> "Timer":
        """The same for this target."""

    def compare_onnx(self, a: Path, b: Path, inputs: Inputs, threads: int) -> Comparison:
        """Two ONNX files on the same inputs."""

    def compare_torch(self, a: nn.Module, b: nn.Module, inputs: Inputs, threads: int) -> Comparison:
        """Two modules in eager torch."""

    def time_onnx(self, path: Path, inputs: Inputs, threads: int) -> float:
        """Seconds of one call of an ONNX file."""

    def time_torch(self, model: nn.Module, inputs: Inputs, threads: int) -> float:
        """Seconds of one call of a module."""

    def steady(self) -> "Timer":
        """The same, for times that are added up: those of options, and of single models, are given at one speed of the
        machine."""

    def time_options(
        self, original: ConvSpec, options: Sequence[OptionGraph], size: Size, threads: int, rounds: int
    ) -> tuple[float, list[float]]:
        """Seconds of a convolution on inputs of this size, and of every option in its place."""


@dataclass(slots=True)
class Speed:
    """How fast a machine is in one target, by its threads: measured when it is first asked for."""

    target: Target
    _seconds: dict[int, float] = field(default_factory=dict)

    def unit(self, threads: int) -> float:
        """Seconds that a convolution of usual size takes."""
        if threads not in self._seconds:
            self._seconds[threads] = time_unit(threads=threads, target=self.target)
        return self._seconds[threads]


@dataclass(frozen=True, slots=True)
class RuntimeTimer:
    """This machine. ``cache`` keeps the times of options; None: the user's own. ``target`` stands in for onnxruntime, or for
    eager torch where it takes modules. ``speed``: the speed of the machine that times are given at; None: that at each call."""

    cache: TimingCache | None = None
    target: Target = ONNXRUNTIME
    speed: Speed | None = None

    @property
    def lasting(self) -> str:
        """The runtime whose times these are, by which they may be kept from run to run; other timers have no such name."""
        return runtime_of(self.target)

    def on(self, target: Target) -> "RuntimeTimer":
        """See :class:`Timer`."""
        return replace(self, target=target, speed=None if self.speed is None else Speed(target))

    def steady(self) -> "RuntimeTimer":
        """See :class:`Timer`."""
        return replace(self, speed=Speed(self.target))

    def compare_onnx(self, a: Path, b: Path, inputs: Inputs, threads: int) -> Comparison:
        """See :class:`Timer`."""
        return compare_onnx(a, b, inputs, threads=threads, target=self._of_files, patience=PATIENCE)

    def compare_torch(self, a: nn.Module, b: nn.Module, inputs: Inputs, threads: int) -> Comparison:
        """See :class:`Timer`."""
        return compare_torch(a, b, inputs, threads=threads, target=self._of_modules, patience=PATIENCE)

    def time_onnx(self, path: Path, inputs: Inputs, threads: int) -> float:
        """See :class:`Timer`."""
        return time_program(Program(onnx=path), inputs, self._of_files, threads=threads, unit=self._unit(threads))

    def time_torch(self, model: nn.Module, inputs: Inputs, threads: int) -> float:
        """See :class:`Timer`."""
        return time_program(Program(module=model), inputs, self._of_modules, threads=threads, unit=self._unit(threads))

    def time_options(
        self, original: ConvSpec, options: Sequence[OptionGraph], size: Size, threads: int, rounds: int
    ) -> tuple[float, list[float]]:
        """See :class:`Timer`."""
        return time_options(
            original, options, size, threads=threads, rounds=rounds, cache=self.cache or TimingCache(), target=self.target,
            unit=self._unit(threads) or partial(Speed(self.target).unit, threads),
        )  # fmt: skip

    def _unit(self, threads: int) -> Callable[[], float] | None:
        return None if self.speed is None else partial(self.speed.unit, threads)

    @property
    def _of_files(self) -> Target:
        return self.target if self.target.takes == "onnx" else ONNXRUNTIME

    @property
    def _of_modules(self) -> Target:
        return self.target if self.target.takes == "module" else TORCH


THIS_MACHINE = RuntimeTimer()


@dataclass(frozen=True, slots=True)
class Baseline:
    """The original's ONNX file, the inputs on which it is timed, a folder for what is timed against it, who makes files, and
    where the result is to run; ``module`` is the original where the target takes modules. ``elsewhere``: times come from
    another machine, and the result cannot be timed here. ``eager``: whether both are timed in eager torch, too."""

    original: Exported
    inputs: Inputs
    folder: Path
    timer: Timer
    threads: int
    exporter: Exporter
    target: Target = ONNXRUNTIME
    module: nn.Module | None = None
    elsewhere: bool = False
    eager: bool = True

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Inputs,
        folder: Path,
        timer: Timer,
        threads: int,
        exporter: Exporter,
        target: Target = ONNXRUNTIME,
        elsewhere: bool = False,
    ) -> "Baseline":
        """The original exported into this folder. Raises ExportError for one that onnxruntime or the target cannot run, and
        UsageError for a target that takes modules where the original is an ONNX graph."""
        if target.takes == "module" and not exporter.exports and not elsewhere:
            raise UsageError(
                f"--runtime {target.name}: expected a PyTorch model, found an ONNX graph; name another runtime"
            )
        original = exporter.original(model, inputs, folder / "original.onnx")
        found = cls(original, inputs, folder, timer.on(target), threads, exporter, target, model, elsewhere)
        if target != ONNXRUNTIME and not elsewhere:
            found.require_runnable()
        return found

    def require_runnable(self) -> None:
        """Raise ExportError unless the target runs the original."""
        one = self.exporter.feed(self.one())
        try:
            with eval_mode(self.module), self.target.at_work(self.threads):
                compiled(Program(self.original.path, self.module), one, self.target, self.threads)()
        except ConvRewriteError as error:
            raise ExportError(str(error)) from error
        except Exception as error:  # every runtime raises its own
            raise ExportError(
                f"--runtime {self.target.name}: cannot run the original: {one_line(error, 200)}"
            ) from error

    @property
    def result(self) -> Path:
        """Where the rewritten model is exported to."""
        return self.folder / "model.onnx"

    def seconds(self, timer: Timer | None = None) -> float:
        """Seconds of the original for one example, by another timer for the same target if one is given."""
        timer, one = self.timer if timer is None else timer, self.one()
        if self.target.takes == "module" and self.module is not None:
            return timer.time_torch(self.module, one, self.threads) / len(one[0])
        return timer.time_onnx(self.original.path, self.exporter.feed(one), self.threads) / len(one[0])

    def ratio(self, model: nn.Module) -> float:
        """The time of another model as a part of the original's: the median of paired ratios."""
        if self.target.takes == "module" and self.module is not None:
            return self.timer.compare_torch(self.module, model, self.one(), self.threads).ratio
        trial = self.exporter.rewritten(model, self.inputs, self.folder / "unfitted.onnx", {})
        one = self.exporter.feed(self.one(trial.dynamic_batch))
        return self.timer.compare_onnx(self.original.path, trial.path, one, self.threads).ratio

    def one(self, dynamic: bool = True) -> Inputs:
        """One example where the original, and with ``dynamic`` what is timed against it, take any number; else the inputs."""
        return tuple(tensor[:1] for tensor in self.inputs) if dynamic and self.original.dynamic_batch else self.inputs


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """In place of a :class:`Baseline` where nothing is exported or timed."""

    def seconds(self, _timer: Timer | None = None) -> float:
        """Raises PlanError."""
        raise PlanError(values.NEEDS_TIMES)

    def ratio(self, _model: nn.Module) -> float:
        """Raises PlanError."""
        raise PlanError(values.NEEDS_TIMES)
