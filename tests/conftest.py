"""Fixtures that several test files share."""

import functools
import gc
import importlib.metadata
import signal
from collections.abc import Iterator

import pytest
import torch
from clocks import NeverSlower
from hypothesis import HealthCheck, settings
from probes import Probes, probes
from scripts import Scripts, scripts
from short_fits import short_fits

from convrewrite import runtime
from convrewrite.fitting import stages
from convrewrite.folders.lasting import FOLDER_VARIABLE
from convrewrite.onnx_files import probing
from convrewrite.stored.result_cache import LIMIT_VARIABLE
from convrewrite.structures.discovery import discover
from convrewrite.structures.structure import Structure
from convrewrite.tuning import refining

pytest_plugins = ["model_files"]


def pytest_configure() -> None:
    """Ctrl-C interrupts here and in what tests start, also where a shell that runs them in the background had it ignored;
    examples may take any time to be made."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # No test depends on a time: on a busy machine the first example alone may take longer than what hypothesis calls slow.
    settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests come first, so that no worker starts a long one while the other has nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def unswept() -> None:
    """What a file of tests finds in memory, mostly modules, stays: else the collector goes through it all, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random numbers of torch's, and leaves none behind."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    yield
    torch.set_rng_state(before)


@pytest.fixture(autouse=True, scope="session")
def own_timings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured times are neither taken from the user's cache nor left there; results are kept by the tests of that alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("timings")))
        patch.setenv(LIMIT_VARIABLE, "0")
        yield


@pytest.fixture(autouse=True, scope="session")
def plugins_looked_for_once() -> Iterator[None]:
    """Nothing is installed meanwhile, and an environment of many packages is read for every group of every run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "entry_points", functools.cache(importlib.metadata.entry_points))
        yield


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
        patch.setattr(refining, "LEAST_STEPS", 5)
        patch.setattr(refining, "STEPS_OF_EFFECT", 0)
        yield


WHOLE_FITS = {"fitting", "rewriting", "test_clusters.py", "test_swaps.py"}
"""Folders and files whose fits take all iterations that users get: they test fits, how little an exchange of
good fits loses, or that other processes do the same."""


@pytest.fixture(autouse=True, scope="module")
def few_iterations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Elsewhere fits go the whole way, and are held to be no worse by it, but in few iterations."""
    with pytest.MonkeyPatch.context() as patch:
        if not WHOLE_FITS & {request.path.name, request.path.parent.name}:
            patch.setattr(stages, "_minimise", short_fits(stages._minimise))
        yield


@pytest.fixture(autouse=True, scope="module")
def quick_probes(request: pytest.FixtureRequest, own_probes: Probes) -> Iterator[None]:
    """Elsewhere than in their own tests, files are tried out in children of one process."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "onnx_files":
            patch.setattr(probing, "subprocess", own_probes)
        yield


@pytest.fixture(scope="session")
def own_probes() -> Iterator[Probes]:
    with probes(probing._PROGRAM) as found:
        yield found


@pytest.fixture(scope="session", name="scripts")
def scripts_forked() -> Iterator[Scripts]:
    with scripts() as found:
        yield found


@pytest.fixture(scope="session")
def structures() -> dict[str, Structure]:
    return discover()
