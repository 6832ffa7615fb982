"""Clocks that lie: options take the seconds that a test gives them, and nothing is run; or all is run, and not waited for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from torch import nn

from convrewrite import runtime
from convrewrite.conv import ConvSpec, Size
from convrewrite.inputs import Inputs
from convrewrite.runtime.latency import compare_programs, time_program
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.timing import RuntimeTimer
from convrewrite.targets import Comparison, Program, Target

Seconds = Callable[[OptionGraph, Size], float]


def macs_of(graph: OptionGraph, size: Size) -> int:
    """MACs of an option, which is one way of lying about its time."""
    total = 0
    for chain in graph:
        at = size
        for spec in chain:
            total += spec.cost([at]).macs
            at = spec.output_size(at)
    return total


def by_macs(graph: OptionGraph, size: Size) -> float:
    """A nanosecond for each MAC."""
    return 1e-9 * macs_of(graph, size)


def compared(ratio: float, runtime: str = "onnxruntime") -> Callable[..., Comparison]:
    """What compares two: the second one takes ``ratio`` of the first one's second."""
    return lambda *_args, **_named: Comparison(runtime, 1, 25, 1.0, ratio, ratio, 0.99 * ratio, 1.01 * ratio)


@dataclass
class FalseTimer:
    """A Timer to hand in: the second model takes ``ratio`` of the first one's time, options take ``seconds``; nothing is run.

    What was asked is noted: the pairs that were compared, the files that were timed with their inputs, the options, and for which
    runtimes and numbers of threads.
    """

    ratio: float = 0.9
    seconds: Seconds = by_macs
    file_seconds: float = 1.0
    compared: list[tuple[object, object, Inputs]] = field(default_factory=list)
    timed: list[tuple[Path, Inputs]] = field(default_factory=list)
    asked: list[OptionGraph] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def on(self, target: Target) -> "FalseTimer":
        self.targets.append(target.name)
        return self

    def compare_onnx(self, a: Path, b: Path, inputs: Inputs, threads: int) -> Comparison:
        self.compared.append((a, b, inputs))
        self.threads.add(threads)
        return compared(self.ratio)()

    def compare_torch(self, a: nn.Module, b: nn.Module, inputs: Inputs, threads: int) -> Comparison:
        self.compared.append((a, b, inputs))
        self.threads.add(threads)
        return compared(self.ratio, "torch")()

    def time_onnx(self, path: Path, inputs: Inputs, threads: int) -> float:
        self.timed.append((path, inputs))
        self.threads.add(threads)
        return self.file_seconds

    def time_torch(self, model: nn.Module, inputs: Inputs, threads: int) -> float:
        return self.file_seconds

    def steady(self) -> "FalseTimer":
        return self

    def time_options(
        self, original: ConvSpec, options: Sequence[OptionGraph], size: Size, threads: int, rounds: int
    ) -> tuple[float, list[float]]:
        self.asked += options
        self.threads.add(threads)
        return self.seconds(((original,),), size), [self.seconds(option, size) for option in options]


ROUNDS, SAMPLE = 2, 1e-4
"""Of a timing whose result counts for nothing, and the seconds of a sample: all is run, but not until the median stands still."""


class NeverSlower(RuntimeTimer):
    """This machine, but results take nine tenths of the original's time, and options as much as their MACs ask."""

    def compare_onnx(self, a: Path, b: Path, inputs: Inputs, threads: int) -> Comparison:
        programs = Program(onnx=a), Program(onnx=b)
        measured = compare_programs(
            *programs, inputs, self._of_files, threads=threads, rounds=ROUNDS, min_seconds=SAMPLE
        )
        return replace(measured, ratio=0.9, ratio_low=0.8, ratio_high=1.0)

    def compare_torch(self, a: nn.Module, b: nn.Module, inputs: Inputs, threads: int) -> Comparison:
        programs = Program(module=a), Program(module=b)
        return compare_programs(*programs, inputs, self._of_modules, threads=threads, rounds=ROUNDS, min_seconds=SAMPLE)

    def time_onnx(self, path: Path, inputs: Inputs, threads: int) -> float:
        return time_program(
            Program(onnx=path), inputs, self._of_files, threads=threads, rounds=ROUNDS, min_seconds=SAMPLE
        )

    def time_torch(self, model: nn.Module, inputs: Inputs, threads: int) -> float:
        return time_program(
            Program(module=model), inputs, self._of_modules, threads=threads, rounds=ROUNDS, min_seconds=SAMPLE
        )

    def time_options(
        self, original: ConvSpec, options: Sequence[OptionGraph], size: Size, threads: int, rounds: int
    ) -> tuple[float, list[float]]:
        """By their MACs: which options are taken must not hang on a busy machine."""
        return 1e-6 * by_macs(((original,),), size), [1e-6 * by_macs(option, size) for option in options]


def in_place_of_this_machine(patch: pytest.MonkeyPatch, timer: FalseTimer) -> FalseTimer:
    """Hand a clock to the command line, which takes none: settings that name no timer get this one."""
    patch.setattr(runtime, "THIS_MACHINE", timer)
    return timer
