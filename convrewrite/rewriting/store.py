"""Tensors in memory up to a limit, the others in files of a temporary folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convrewrite.folders import Scratch, require_room, temporary, told


@dataclass(slots=True, eq=False)
class Kept:
    """A value in a :class:`Store`: itself while it is in memory, or the file it waits in. ``size`` is in bytes; ``shared``:
    another value has the same memory."""

    value: Any
    size: int
    shared: bool
    path: Path | None = None


class Store:
    """Keeps values; tensors beyond ``limit`` bytes wait on disk."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._movable: dict[int, Kept] = {}
        self._folder: Scratch | None = None
        self._count = 0

    def put(self, value: Any, *, shared: bool) -> Kept:
        """Keep a value; ``shared`` memory stays where it is, or it would not be shared."""
        size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        kept = Kept(value, size, shared)
        self._used += kept.size
        if kept.size and not shared:
            self._movable[id(kept)] = kept
        self._spill()
        return kept

    def get(self, kept: Kept) -> Any:
        """The value that :meth:`put` was given."""
        return kept.value if kept.path is None else torch.load(kept.path, weights_only=True)

    def drop(self, kept: Kept) -> None:
        """Forget a value, and give its room back."""
        if kept.path is not None:
            kept.path.unlink()
        else:
            self._used -= kept.size
            self._movable.pop(id(kept), None)

    def shrink(self, limit: int) -> None:
        """From now on at most so many bytes in memory."""
        self._limit = limit
        self._spill()

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.close()

    def _spill(self) -> None:
        """Move the values that came last to disk: they are asked for in the order they came, so these last again."""
        while self._used > self._limit and self._movable:
            _, kept = self._movable.popitem()
            if self._folder is None:
                self._folder = temporary()
            path = self._folder.path / f"{self._count}.pt"
            self._count += 1
            _save(kept.value.clone(), path)
            kept.value, kept.path = None, path
            self._used -= kept.size


def _save(value: Tensor, path: Path) -> None:
    """Raises UsageError where the disk takes no more."""
    with told():
        try:
            torch.save(value, path)
        except RuntimeError:
            require_room(path)
            raise
