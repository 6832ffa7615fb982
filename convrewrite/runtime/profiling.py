"""Graphs to be timed on another machine, and a timer that answers with what was measured there."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from convrewrite.conv import ConvSpec, Size
from convrewrite.errors import PlanError
from convrewrite.inputs import Inputs
from convrewrite.runtime.latency import ONNXRUNTIME
from convrewrite.runtime.option_graphs import OptionGraph, option_program
from convrewrite.runtime.timing import Timer
from convrewrite.targets import ORIGINAL, Comparison, Profile, Target

KEY_LENGTH = 32
"""Hexadecimal digits of a key, which is the name of a file too."""


def option_key(original: ConvSpec, option: OptionGraph, size: Size) -> str:
    """The key of an option's seconds in a file of timings."""
    facts = [size, asdict(original), [[asdict(spec) for spec in chain] for chain in option]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, slots=True)
class OptionsAt:
    """All options in place of one convolution, on inputs of one size."""

    original: ConvSpec
    size: Size
    options: tuple[OptionGraph, ...]

    def times(self, timer: Timer, threads: int, rounds: int) -> dict[str, float]:
        """The seconds of the original and of all options, measured here, by their keys."""
        before, after = timer.time_options(self.original, self.options, self.size, threads, rounds)
        return dict(zip(self._graphs(), [before, *after], strict=True))

    def written(self, folder: Path) -> dict[str, Any]:
        """Write the graphs, framed, into a folder; returns what they are, for :func:`convrewrite.targets.list_graphs`."""
        spec = self.original
        frame = option_key(spec, (), self.size)
        shape: tuple[int, ...] = ()
        for key, graph in {frame: (), **self._graphs()}.items():
            program, shape = option_program(ONNXRUNTIME, graph, self.size, channels=spec.in_channels, dims=spec.dims)
            assert isinstance(program.onnx, bytes)
            (folder / f"{key}.onnx").write_bytes(program.onnx)
        return {"graphs": [frame, *self._graphs()], "input": list(shape)}

    def _graphs(self) -> dict[str, OptionGraph]:
        graphs = (((self.original,),), *self.options)
        return {option_key(self.original, graph, self.size): graph for graph in graphs}


@dataclass(frozen=True, slots=True)
class ProfiledTimer:
    """Answers with the times in a profile. Whole models other than the original are not in it, so nothing is compared."""

    profile: Profile
    source: str

    def on(self, _target: Target) -> "ProfiledTimer":
        """The same: the profile says what it was measured on."""
        return self

    def compare_onnx(self, _a: Path, _b: Path, _inputs: Inputs, _threads: int) -> Comparison:
        """Raises PlanError."""
        raise PlanError(self._lacking("whole models"))

    def compare_torch(self, _a: nn.Module, _b: nn.Module, _inputs: Inputs, _threads: int) -> Comparison:
        """Raises PlanError."""
        raise PlanError(self._lacking("whole models"))

    def time_onnx(self, _path: Path, inputs: Inputs, _threads: int) -> float:
        """The original's time, for as many examples. Raises PlanError where the profile has none."""
        return self._seconds(ORIGINAL, "the original") * len(inputs[0])

    def time_torch(self, _model: nn.Module, inputs: Inputs, _threads: int) -> float:
        """As above."""
        return self._seconds(ORIGINAL, "the original") * len(inputs[0])

    def steady(self) -> "ProfiledTimer":
        """The same: all were measured together."""
        return self

    def time_options(
        self, original: ConvSpec, options: Sequence[OptionGraph], size: Size, _threads: int, _rounds: int
    ) -> tuple[float, list[float]]:
        """As they were measured. Raises PlanError for an option that was not."""
        at = f"{original.describe()} at {size[0]}x{size[1]}"
        before, *after = (self._seconds(option_key(original, graph, size), at) for graph in (((original,),), *options))
        return before, after

    def _seconds(self, key: str, what: str) -> float:
        if key not in self.profile.seconds:
            raise PlanError(self._lacking(what))
        return self.profile.seconds[key]

    def _lacking(self, what: str) -> str:
        return (
            f"--timings {self.source}: expected the time of {what}, found none; profile this model again, with the rules it "
            "is planned with"
        )
