"""Wall time of named stages, added up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


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
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items of an iterator; the time it takes to make them counts for ``name``, not what is done with them."""
        while True:
            with self.timed(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
