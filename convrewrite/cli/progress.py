"""How a command shows how far it is: bars in a terminal, a text that changes in a notebook, and a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from convrewrite.cli.voice import is_quiet, say_aside
from convrewrite.escaping import printable
from convrewrite.interrupts import held, raise_unheard
from convrewrite.progress import silent
from convrewrite.run_stages import RunStages
from convrewrite.tables import WIDTH, shortened

if TYPE_CHECKING:
    from convrewrite.progress import Progress
    from convrewrite.settings import Settings

SECONDS_BETWEEN_LINES = 5.0
"""Where lines are kept, as in the log of a job: a run of an hour leaves some hundreds."""

SECONDS_BETWEEN_CHANGES = 0.5
"""Where a text is replaced: no one reads faster, and each is a message to a browser."""


def stages_of(settings: "Settings", calib: str | None, command: str, *, several: bool = False) -> tuple[str, ...]:
    """The stages of ``optimize``, ``plan``, ``apply`` or ``sweep``, as far as they follow from what was asked; ``several``: rules
    compete.

    Swaps, and whether a plan within a budget leaves anything to refine, cannot be known before.
    """
    asked = settings.budget or settings.keep is not None or command == "sweep"
    real = calib is not None and calib != "weights"
    fits = command != "plan" or settings.keep is not None or (several and not asked)
    refines = settings.refine if settings.refine is not None else real and not asked and not settings.fast
    wanted = {
        "prepare": True,
        "synthesise inputs": calib is None,
        "survey": asked and command != "apply",
        "latency": "latency" in (settings.budget or {}) and command != "apply",
        "points": command == "sweep",
        "fit": fits and command != "sweep",
        "refine": refines and command in ("optimize", "apply"),
        "verify": settings.measure and command in ("optimize", "apply"),
        "export": settings.exports and command in ("optimize", "apply"),
    }
    return tuple(name for name, comes in wanted.items() if comes)


class _View(Protocol):
    """Where progress is shown."""

    def change(self) -> None:
        """Progress was reported."""

    def end(self) -> None:
        """The run came to its end, or to an error."""


@contextmanager
def progress_bars(*expected: str) -> "Iterator[Progress]":
    """Progress on the error stream, so that the report can be piped, or in the cell of a notebook; nothing with ``--quiet``.

    ``expected``: the stages that will come, in order, as far as that is known; the time that is left is estimated by them.
    """
    if is_quiet():
        yield silent
        return
    stages, views = RunStages(expected), list[_View]()

    def show(stage: str, done: int, total: int, text: str) -> None:
        raise_unheard()
        with held():  # a line that is half drawn would run into the message about an interrupt
            stages.tell(printable(stage), done, total, printable(text))
            if not views:
                views.append(_view(stages))
            views[0].change()

    try:
        yield show
    finally:
        if views:  # what never began would leave an empty line above the error
            with held():
                views[0].end()


def _view(stages: RunStages) -> _View:
    if (notebook := _notebook()) is not None:
        return _Cell(stages, notebook)
    if sys.stderr.isatty():
        from rich.console import Console

        console = Console(file=sys.stderr)  # as it is now: the stand-in while a thread is quiet is not for bars
        if console.is_terminal and not console.is_dumb_terminal:
            from convrewrite.cli.bars import Bars

            return Bars(stages, console)
    return _Lines(stages)


def _notebook() -> Any:
    """The function that displays in the running cell of a notebook; None: this is no notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    return display


class _Lines:
    """Plain lines, at most one in :data:`SECONDS_BETWEEN_LINES`, and one at the end."""

    def __init__(self, stages: RunStages, clock: Callable[[], float] = time.monotonic) -> None:
        self._stages, self._clock = stages, clock
        self._last = -SECONDS_BETWEEN_LINES

    def change(self) -> None:
        """A line, if it is time for one."""
        now = self._clock()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            line = self._stages.line()
            say_aside(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…")

    def end(self) -> None:
        """How long each stage took."""
        say_aside(shortened(self._stages.summary()))


class _Cell:
    """One text in a notebook's cell, which is replaced."""

    def __init__(self, stages: RunStages, display: Any) -> None:
        self._stages, self._display = stages, display
        self._last = 0.0
        self._handle: Any = None

    def change(self) -> None:
        """Another text, if it is time for one."""
        if self._handle is None:
            self._handle = self._display(self._data(self._stages.line()), raw=True, display_id=True)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_CHANGES:
            self._handle.update(self._data(self._stages.line()), raw=True)
        else:
            return
        self._last = time.monotonic()

    def end(self) -> None:
        """How long each stage took."""
        self._handle.update(self._data(self._stages.summary()), raw=True)

    @staticmethod
    def _data(line: str) -> dict[str, str]:
        return {"text/plain": line}
