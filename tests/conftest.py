"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest
import torch

from convrewrite.structure import Structure
from convrewrite.structures import discover

pytest_plugins = ["model_files"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves none behind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def structures() -> dict[str, Structure]:
    return discover()
