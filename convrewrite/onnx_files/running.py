"""Runs of onnxruntime that can be ended: by Ctrl-C and its like, and after a time.

While a graph runs, its thread handles no signals. So it runs in another thread, and the calling thread waits.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import onnxruntime as ort

from convrewrite.errors import ModelLoadError

PATIENCE = 10
"""A later run may take so many times the seconds that a first one may: it has more examples, and the machine may be busy."""

FAREWELL = 5.0
"""Seconds that a run which is being ended has to finish its current operator; then it is left behind."""

IDLE = 1.0
"""Seconds that a thread waits for another run: to start one takes longer than many a run, above all on a busy machine."""


def run_within(
    session: ort.InferenceSession, names: Sequence[str] | None, feed: Mapping[str, Any], seconds: float, where: str
) -> list[Any]:
    """What a session gives for ``feed``; ``names`` are the outputs, None for all.

    Raises what onnxruntime raises, and ModelLoadError, naming ``where``, for a run that takes more than ``seconds``.
    """
    run = _Run(session, names, dict(feed))
    _Worker.free().begin(run)
    try:
        ended = run.done.wait(seconds)
    finally:
        if not run.done.is_set():
            run.options.terminate = True
            run.done.wait(FAREWELL)
    if not ended:
        raise ModelLoadError(
            f"{where}: expected that onnxruntime runs it on these inputs within {seconds:g} s, found that it does not end in "
            "that time; leave out inputs on which a loop in it goes on, or give it more if it is only slow (--timeout 300, in "
            "Python timeout=300)"
        )
    return run.found()


class _Run:
    """One run, in whatever thread does its work. Callers wait for ``done``: an interrupted ``join`` would forget the thread."""

    def __init__(self, session: ort.InferenceSession, names: Sequence[str] | None, feed: dict[str, Any]) -> None:
        self.options, self.done = ort.RunOptions(), threading.Event()
        self.options.log_severity_level = 4
        self._session, self._names, self._feed = session, names, feed
        self._found: list[Any] = []
        self._error: BaseException | None = None

    def work(self) -> None:
        """Run, and keep what comes of it."""
        try:
            self._found = self._session.run(self._names, self._feed, self.options)
        except BaseException as error:  # raised again in the thread that waits
            self._error = error

    def found(self) -> list[Any]:
        """The outputs; raises what the run did."""
        if self._error is not None:
            raise self._error
        return self._found


class _Worker:
    """A thread that does runs, one after another. It ends where none comes, and after one that was ended."""

    idle: ClassVar[list["_Worker"]] = []

    def __init__(self) -> None:
        self._runs: SimpleQueue[_Run] = SimpleQueue()
        # A daemon: a thread that is left behind must not keep the process alive.
        threading.Thread(target=self._work, daemon=True).start()

    @classmethod
    def free(cls) -> "_Worker":
        """An idle one, or a new one."""
        try:
            return cls.idle.pop()
        except IndexError:
            return cls()

    def begin(self, run: _Run) -> None:
        """Do this run next."""
        self._runs.put(run)

    def _work(self) -> None:
        while self._does_one():
            pass

    def _does_one(self) -> bool:
        """Whether another run may follow. The run is forgotten then: it holds a session, inputs and outputs."""
        try:
            run = self._runs.get(timeout=IDLE)
        except Empty:
            return not self._retired()
        run.work()
        ended = bool(run.options.terminate)
        if not ended:  # idle before it is done: the caller may have the next run at once
            self.idle.append(self)
        run.done.set()
        return not ended

    def _retired(self) -> bool:
        """Whether it was idle still; otherwise someone has taken it, and a run is about to come."""
        try:
            self.idle.remove(self)
        except ValueError:
            return False
        return True


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_Worker.idle.clear)  # threads stay in the parent
