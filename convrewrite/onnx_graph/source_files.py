"""Whether the files of a graph are still those that were opened: a training run may write its next export over them meanwhile."""

import os
from collections.abc import Collection
from pathlib import Path

from convrewrite.errors import ModelLoadError
from convrewrite.onnx_files import Provenance

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
        """``stamp`` is that of ``path`` before it was read. Raises ModelLoadError where a file ``beside`` it is none."""
        if gone := next((file for file in beside if not os.path.isfile(file)), None):
            raise ModelLoadError(f"{path}: expected weights in {gone}, as it says, found no such file; put that there")
        self._path, self._beside = path, tuple(beside)
        self._stamps = {path: stamp, **{file: stamp_of(file) for file in beside}}
        self._digest: str | None = None

    def digest(self) -> str:
        """That of the files as they were opened, for :class:`Provenance`. Raises ModelLoadError where one is another by now."""
        self.require_unchanged()
        if self._digest is None:
            self._digest = self._digest_now()
        return self._digest

    def require_unchanged(self) -> None:
        """Raise ModelLoadError where a file is another than the one that was opened."""
        stamps = {file: stamp_of(file) for file in self._stamps}
        changed = [file for file, stamp in stamps.items() if stamp != self._stamps[file]]
        if not changed:
            return
        lost = any(stamps[file] is None for file in changed)
        if lost or self._digest is None or self._digest_now() != self._digest:
            raise _changed(changed[0])
        self._stamps = stamps  # touched, and the same

    def _digest_now(self) -> str:
        return Provenance.digest_of_source(self._path, self._beside)


def _changed(file: Path) -> ModelLoadError:
    return ModelLoadError(
        f"{file}: expected the file that was opened, found that it has been changed or removed while it was worked on; run this "
        "again, on a copy if something else goes on to write it"
    )
