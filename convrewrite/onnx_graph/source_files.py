"""Whether the files of a graph are still those that were opened: a training run may write its next export over them meanwhile."""

from collections.abc import Collection
from pathlib import Path

from convrewrite.errors import ModelLoadError
from convrewrite.onnx_files import digest_of

Stamp = tuple[int, int] | None
"""Size and time of the last change of a file; None where there is none."""


def stamp_of(path: Path) -> Stamp:
    """That of a file now."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a NUL in a name
        return None
    return found.st_size, found.st_mtime_ns


class SourceFiles:
    """An ONNX file and those beside it that hold weights of it. Contents are read once, and again only where a stamp differs."""

    def __init__(self, path: Path, stamp: Stamp, beside: Collection[Path] = ()) -> None:
        """``stamp`` is that of ``path`` before it was read."""
        self._path, self._stamp = path, stamp
        self._beside = {file: stamp_of(file) for file in beside}
        self._digest: str | None = None

    def digest(self) -> str:
        """The SHA-256 of the ONNX file as it was opened. Raises ModelLoadError where a file is another by now."""
        self.require_unchanged()
        if self._digest is None:
            self._digest = digest_of(self._path)
        return self._digest

    def require_unchanged(self) -> None:
        """Raise ModelLoadError where a file is another than the one that was opened."""
        for file, stamp in self._beside.items():
            if stamp_of(file) != stamp:
                raise _changed(file)
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        if stamp is None or self._digest is None or digest_of(self._path) != self._digest:
            raise _changed(self._path)
        self._stamp = stamp  # touched, and the same


def _changed(file: Path) -> ModelLoadError:
    return ModelLoadError(
        f"{file}: expected the file that was opened, found that it has been changed or removed while it was worked on; run this "
        "again, on a copy if something else goes on to write it"
    )
