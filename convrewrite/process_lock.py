"""The lock of what belongs to the whole process, and how to undo what its holder has changed there.

A process that is forked while another thread holds it has no such thread, and nobody would ever release it: in the child the lock
is made anew, and what that thread had changed is undone.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


class ProcessLock:
    """A lock that the thread which holds it may take again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._undo: list[Callable[[], object]] = []
        if hasattr(os, "register_at_fork"):  # Windows has no fork
            os.register_at_fork(after_in_child=self._of_child)

    def __enter__(self) -> None:
        """Wait for it."""
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        """Release it."""
        self._lock.release()

    @contextmanager
    def changed(self, undo: Callable[[], object]) -> Iterator[None]:
        """Inside the block something of the process is changed, by one thread at a time; ``undo`` puts it back."""
        with self:
            self._undo.append(undo)
            try:
                yield
            finally:
                self._undo.pop()()

    def _of_child(self) -> None:
        if self._lock.acquire(blocking=False):  # it is nobody's, or the thread's that forked, which goes on here
            self._lock.release()
            return
        self._lock = threading.RLock()
        with ExitStack() as stack:
            for undo in self._undo:
                stack.callback(undo)
            self._undo = []
