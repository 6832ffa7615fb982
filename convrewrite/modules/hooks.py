"""Hooks that stay on modules while a block runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """The hooks of these handles stay until the end of the block, however it ends.

    ``handles`` may register the hooks while it is iterated: if that fails half way, those registered already are removed too.
    """
    standing: list[RemovableHandle] = []
    try:
        standing.extend(handles)  # one by one: those before a failure are in the list
        yield
    finally:
        for handle in standing:
            handle.remove()
