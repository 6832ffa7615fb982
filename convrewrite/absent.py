"""Files whose content is not there: empty ones, and those that only point to it."""

from pathlib import Path

from convrewrite.errors import ModelLoadError

POINTER = b"version https://git-lfs.github.com/"
"""How a file begins that Git LFS leaves in place of a large one until that is fetched."""


def require_content(path: Path, expected: str = "a model file") -> None:
    """Raise ModelLoadError for a file without the content that its name promises."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if not start:
        raise ModelLoadError(f"{path}: expected {expected}, found an empty file; save or download it again")
    if start == POINTER:
        raise ModelLoadError(
            f"{path}: expected {expected}, found what Git LFS leaves in its place; fetch the file itself (git lfs pull)"
        )
