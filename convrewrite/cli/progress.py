"""How a command shows the progress of its stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from convrewrite.cli.voice import is_quiet
from convrewrite.escaping import printable
from convrewrite.interrupts import held
from convrewrite.progress import silent

if TYPE_CHECKING:
    from convrewrite.progress import Progress


@contextmanager
def progress_bars() -> "Iterator[Progress]":
    """A bar per stage on the error stream, so that the report can be piped; nothing with ``--quiet``."""
    if is_quiet():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.fields[stage]:<18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int, text: str) -> None:
        with held():  # a line that is half drawn would run into what is said of the interrupt
            if not tasks:
                bars.start()
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(text), total=total, stage=stage)
            bars.update(tasks[stage], completed=done, total=total, description=printable(text))

    try:
        yield show
    finally:
        if tasks:  # bars that were never started would leave an empty line above the error
            with held():
                bars.stop()
