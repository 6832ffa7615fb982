"""Where results and timings are kept from run to run."""

import os
from pathlib import Path

import platformdirs

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
