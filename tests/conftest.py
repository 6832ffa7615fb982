"""Fixtures that several test files share."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convrewrite import runtime
from convrewrite.inputs import Inputs
from convrewrite.runtime.timing import RuntimeTimer
from convrewrite.runtime.timing_cache import FOLDER_VARIABLE
from convrewrite.stored.result_cache import LIMIT_VARIABLE
from convrewrite.structures.discovery import discover
from convrewrite.structures.structure import Structure
from convrewrite.targets import Comparison

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


class NeverSlower(RuntimeTimer):
    """This machine, but results take nine tenths of the original's time."""

    def compare_onnx(self, a: Path, b: Path, inputs: Inputs, threads: int) -> Comparison:
        measured = RuntimeTimer.compare_onnx(self, a, b, inputs, threads)
        return replace(measured, ratio=0.9, ratio_low=0.8, ratio_high=1.0)


@pytest.fixture(autouse=True, scope="session")
def never_slower() -> Iterator[None]:
    """No test depends on a time: results are timed, but none is refused for what a busy machine says of a tiny network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "THIS_MACHINE", NeverSlower())
        yield


@pytest.fixture(scope="session")
def structures() -> dict[str, Structure]:
    return discover()
