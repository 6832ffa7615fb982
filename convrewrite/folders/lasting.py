"""Where results and timings are kept from run to run."""

import os
from functools import cache
from pathlib import Path

import platformdirs

from convrewrite.folders.scratch import Scratch, remove_leftovers

FOLDER_VARIABLE = "CONVREWRITE_CACHE"

NOWHERE = Path(os.devnull) / "convrewrite"
"""A place in which nothing can be made or found."""


def user_cache() -> Path:
    """The folder that ``CONVREWRITE_CACHE`` names, otherwise the user's own; NOWHERE for a user who has none, as in a container
    without ``HOME`` where the user is a bare number."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    try:
        return Path(platformdirs.user_cache_dir("convrewrite"))
    except RuntimeError:
        return NOWHERE


def scratch_of_cache(folder: Path) -> Scratch:
    """A scratch folder among the entries of a cache. Raises OSError where it cannot be made.

    What ended processes left is looked for once in a process: there may be tens of thousands of entries, and every one is looked
    at for that.
    """
    _sweep_once(folder)
    return Scratch(folder, swept=True)


@cache
def _sweep_once(folder: Path) -> None:
    remove_leftovers(folder)
