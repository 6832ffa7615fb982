"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest
import torch

from convrewrite.structure import Structure
from convrewrite.structures import discover
from convrewrite.timing_cache import FOLDER_VARIABLE

pytest_plugins = ["model_files"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves none behind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_timings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured times are neither taken from the user's cache nor left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("timings")))
        yield


@pytest.fixture(scope="session")
def structures() -> dict[str, Structure]:
    return discover()
