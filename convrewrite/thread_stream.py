"""A stream in the place of standard output or error that keeps quiet for one thread only."""

import io
import threading
from typing import IO


class ThreadStream(io.TextIOBase):
    """Swallows what the thread that made it writes, until it is released; other threads write to the original stream."""

    def __init__(self, original: IO[str] | None) -> None:
        super().__init__()
        self._original = original
        self._owner: int | None = threading.get_ident()

    def release(self) -> None:
        """From here on all is written to the original: another thread that took this stream for the process's own, as
        ``redirect_stdout`` does, may put it back later."""
        self._owner = None

    def _target(self) -> IO[str] | None:
        return None if threading.get_ident() == self._owner else self._original

    def write(self, text: str) -> int:
        """The number of characters, also of those swallowed."""
        target = self._target()
        return len(text) if target is None else target.write(text)

    def flush(self) -> None:
        """Of the original stream, for other threads."""
        target = self._target()
        if target is not None:
            target.flush()

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Whether the original is a terminal, for other threads."""
        target = self._target()
        return target is not None and target.isatty()

    def fileno(self) -> int:
        """That of the original, for other threads. Raises io.UnsupportedOperation for the thread itself."""
        target = self._target()
        if target is None:
            raise io.UnsupportedOperation("fileno")
        return target.fileno()
