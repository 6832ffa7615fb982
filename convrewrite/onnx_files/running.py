"""Runs of onnxruntime that can be ended: by Ctrl-C and its like, and after a time.

While a graph runs, its thread handles no signals. So it runs in a thread of its own, and the calling thread waits.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort

from convrewrite.errors import ModelLoadError

PATIENCE = 10
"""A later run may take so many times the seconds that a first one may: it has more examples, and the machine may be busy."""

FAREWELL = 5.0
"""Seconds that a run which is being ended has to finish its current operator; then it is left behind."""


def run_within(
    session: ort.InferenceSession, names: Sequence[str] | None, feed: Mapping[str, Any], seconds: float, where: str
) -> list[Any]:
    """What a session gives for ``feed``; ``names`` are the outputs, None for all.

    Raises what onnxruntime raises, and ModelLoadError, naming ``where``, for a run that takes more than ``seconds``.
    """
    run = _Run(session, names, dict(feed))
    # A daemon: a thread that is left behind must not keep the process alive.
    threading.Thread(target=run.work, daemon=True).start()
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
        finally:
            self.done.set()

    def found(self) -> list[Any]:
        """The outputs; raises what the run did."""
        if self._error is not None:
            raise self._error
        return self._found
