"""Paths as a caller gives them."""

from os import PathLike, fspath
from pathlib import Path

from convrewrite.errors import UsageError

SAVED = "the folder that a result was saved in, as with result.save(folder)"


def given_path(value: object, expected: str = SAVED) -> Path:
    """The path. Raises UsageError for anything else, so that no folder is made with such a name."""
    text = fspath(value) if isinstance(value, str | PathLike) else None
    if not isinstance(text, str):
        raise UsageError(f"expected {expected}, found {type(value).__name__}")
    return Path(text)
