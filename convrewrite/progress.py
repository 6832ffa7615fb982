"""How the progress of a run is reported, and the wall time of its stages."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

LOG = logging.getLogger(__name__)

LOGGED = 0.1
"""A part of a stage that takes so many seconds or more gets a line in the log; short batches, by the hundred, do not."""

Element = TypeVar("Element")


@dataclass(slots=True)
class Stopwatch:
    """``seconds`` has the wall time of each stage; a stage that runs again adds to its own."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """The time of the block counts for ``name``, also when it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            if spent >= LOGGED:
                LOG.debug("%s: %.1f s", name, spent)

    def __str__(self) -> str:
        """For a log, the longest stage first."""
        longest = sorted(self.seconds.items(), key=lambda entry: -entry[1])
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in longest)

    def each(self, name: str, items: Iterator[Element]) -> Iterator[Element]:
        """The items of an iterator; the time it takes to make them counts for ``name``, not what is done with them."""
        while True:
            with self.timed(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


Progress = Callable[[str, int, int, str], None]
"""Function that is called with a stage's name, how many of its steps are done, how many there are, and what is being done."""


def silent(stage: str, done: int, total: int, text: str) -> None:
    """No progress is shown."""
