"""Hooks on modules that stand while a block runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """The hooks of these handles stand until the end of the block, however it ends.

    ``handles`` may register as it is gone through: where that fails half way, what stands already is removed too.
    """
    standing: list[RemovableHandle] = []
    try:
        standing.extend(handles)  # one by one: those before a failure are in the list
        yield
    finally:
        for handle in standing:
            handle.remove()
