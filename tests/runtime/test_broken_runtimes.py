"""A runtime of another package whose clock stands still, or whose outputs are too many or of another shape: one error, soon."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from clocks import FalseTimer
from commands import images, small_network

import convrewrite
from convrewrite.errors import VerificationError
from convrewrite.runtime.latency import compiled
from convrewrite.targets import Compiled, OnnxRuntime, Program, discovery, interleaving
from convrewrite.targets.target import Clock


class UnspeakableError(Exception):
    """An error that fails when it is asked for its text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@dataclass(frozen=True)
class Broken(OnnxRuntime):
    """onnxruntime with one fault, which is what stands behind the colon."""

    @property
    def name(self) -> str:
        return f"broken:{self.option}" if self.option else "broken"

    def version(self) -> str:
        return "1"

    def block(self) -> int:
        return 8

    def clock(self, threads: int) -> Clock:
        return (lambda: 1.0) if self.option == "clock" else super().clock(threads)

    def compile(self, program: Program, inputs: Sequence[Any], threads: int) -> Compiled:
        if self.option == "text":
            raise UnspeakableError
        run = OnnxRuntime().compile(program, inputs, threads)
        if self.option == "number":
            return lambda: [*run(), *run()]
        return (lambda: [array[:, :-1] for array in run()]) if self.option == "shape" else run


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "kinds_of_targets", lambda: {"broken": Broken})


def optimized(fault: str, timer: FalseTimer | None) -> None:
    convrewrite.optimize(
        small_network(),
        images(1),
        ["separable"],
        images(),
        runtime=f"broken:{fault}",
        timer=timer,
        refine=False,
        fast=True,
    )


def test_an_error_that_has_no_text() -> None:
    with pytest.raises(VerificationError, match="cannot run the model on 0 inputs: UnspeakableError; choose another"):
        compiled(Program(), (), Broken("text"), 1)


def test_a_clock_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaving, "MOST_STILL", 0.05)
    with pytest.raises(VerificationError, match=r"^timing: expected a clock that moves, found .* name another runtime"):
        optimized("clock", None)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("number", r"^broken:number: expected 1 outputs, found 2; mend the runtime"),
        ("shape", r"^broken:shape: output .output.: expected shape \(8, 10\), found \(8, 9\)"),
    ],
)
def test_outputs_of_another_number_or_shape(fault: str, words: str) -> None:
    with pytest.raises(VerificationError, match=words):
        optimized(fault, FalseTimer())
