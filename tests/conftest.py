"""Fixtures that several test files share."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clocks import by_macs
from torch import nn

from convrewrite import runtime
from convrewrite.conv import ConvSpec, Size
from convrewrite.inputs import Inputs
from convrewrite.runtime.latency import compare_onnx, compare_torch, time_program
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.timing import RuntimeTimer
from convrewrite.runtime.timing_cache import FOLDER_VARIABLE
from convrewrite.stored.result_cache import LIMIT_VARIABLE
from convrewrite.structures.discovery import discover
from convrewrite.structures.structure import Structure
from convrewrite.targets import Comparison, Program
from convrewrite.tuning import refining

pytest_plugins = ["model_files"]


def pytest_configure() -> None:
    """Ctrl-C interrupts here and in what tests start, also where a shell that runs them in the background had it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests come first, so that no worker starts a long one while the other has nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves none behind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_timings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured times are neither taken from the user's cache nor left there; results are kept by the tests of that alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("timings")))
        patch.setenv(LIMIT_VARIABLE, "0")
        yield


ROUNDS = 2
"""Of a timing whose result counts for nothing: all is run, but not until the median stands still."""


class NeverSlower(RuntimeTimer):
    """This machine, but results take nine tenths of the original's time, and options as much as their MACs ask."""

    def compare_onnx(self, a: Path, b: Path, inputs: Inputs, threads: int) -> Comparison:
        measured = compare_onnx(a, b, inputs, threads=threads, rounds=ROUNDS, target=self._of_files)
        return replace(measured, ratio=0.9, ratio_low=0.8, ratio_high=1.0)

    def compare_torch(self, a: nn.Module, b: nn.Module, inputs: Inputs, threads: int) -> Comparison:
        return compare_torch(a, b, inputs, threads=threads, rounds=ROUNDS, target=self._of_modules)

    def time_onnx(self, path: Path, inputs: Inputs, threads: int) -> float:
        return time_program(Program(onnx=path), inputs, self._of_files, threads=threads, rounds=ROUNDS)

    def time_torch(self, model: nn.Module, inputs: Inputs, threads: int) -> float:
        return time_program(Program(module=model), inputs, self._of_modules, threads=threads, rounds=ROUNDS)

    def time_options(
        self, original: ConvSpec, options: Sequence[OptionGraph], size: Size, threads: int, rounds: int
    ) -> tuple[float, list[float]]:
        """By their MACs: which options are taken must not hang on a busy machine."""
        return 1e-6 * by_macs(((original,),), size), [1e-6 * by_macs(option, size) for option in options]


@pytest.fixture(autouse=True, scope="session")
def never_slower() -> Iterator[None]:
    """No test depends on a time: results are timed, but none is refused for what a busy machine says of a tiny network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "THIS_MACHINE", NeverSlower())
        yield


@pytest.fixture(autouse=True, scope="session")
def short_refinements() -> Iterator[None]:
    """Results are refined as ever, and held to be no worse by it, but in few steps; test_refining.py takes all that it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "LEAST_STEPS", 25)
        patch.setattr(refining, "STEPS_OF_EFFECT", 0)
        yield


@pytest.fixture(scope="session")
def structures() -> dict[str, Structure]:
    return discover()
