"""What a caller names a place by."""

from os import PathLike, fspath
from pathlib import Path

from convrewrite.errors import UsageError

SAVED = "the folder that a result was saved in, as with result.save(folder)"


def given_path(value: object, expected: str = SAVED) -> Path:
    """The path. Raises UsageError for anything else, which no folder of that name should be made for."""
    text = fspath(value) if isinstance(value, str | PathLike) else None
    if not isinstance(text, str):
        raise UsageError(f"expected {expected}, found {type(value).__name__}")
    return Path(text)
