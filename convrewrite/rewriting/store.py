"""Tensors in memory up to a limit, and further ones in files of a temporary folder."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convrewrite.folders import Scratch, temporary, write_errors

MAPPED = sys.platform != "win32"
"""Whether files are mapped into memory: on Windows a mapped file cannot be removed."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A tensor that waits in a file, its numbers in the order they had in memory. Where the file is mapped, asking for the tensor
    copies nothing, and writing to it only what is written to."""

    path: Path
    size: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device

    @classmethod
    def put(cls, value: Tensor, path: Path) -> "Waiting":
        """Write a tensor to a file. Raises UsageError where the disk is full."""
        with torch.no_grad():
            exact = _dense(value.detach().resolve_conj().resolve_neg())
            flat = exact.as_strided((exact.numel(),), (1,)).view(torch.uint8).cpu()
        with write_errors(), path.open("wb") as file:
            file.write(flat.numpy().data)
        return cls(path, flat.numel(), exact.dtype, exact.shape, exact.stride(), exact.device)

    def get(self) -> Tensor:
        """The tensor; writing to it does not change the file."""
        return self._numbers().view(self.dtype).as_strided(self.shape, self.stride).to(self.device)

    def _numbers(self) -> Tensor:
        if MAPPED:
            return torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        return torch.from_numpy(np.fromfile(self.path, np.uint8))


def _dense(value: Tensor) -> Tensor:
    """The same numbers without gaps; a channels-last layout is kept."""
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return value if channels_last else value.contiguous()


def _plain(value: Any) -> bool:
    """Whether a value is a plain tensor of numbers in memory."""
    return type(value) is Tensor and value.layout == torch.strided and not value.is_quantized


@dataclass(slots=True, eq=False)
class StoredValue:
    """A value in a :class:`Store`: the value itself while it is in memory, or the file where it waits. ``size`` is in bytes;
    ``shared``: another value has the same memory."""

    value: Any
    size: int
    shared: bool
    waiting: Waiting | None = None


class Store:
    """Keeps values; tensors beyond ``limit`` bytes wait on disk."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._movable: dict[int, StoredValue] = {}
        self._folder: Scratch | None = None
        self._count = 0

    def put(self, value: Any, *, shared: bool) -> StoredValue:
        """Keep a value; ``shared`` memory never goes to disk, as it would not be shared any more."""
        size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        kept = StoredValue(value, size, shared)
        self._used += kept.size
        if kept.size and not shared and _plain(value):
            self._movable[id(kept)] = kept
        self._spill()
        return kept

    def get(self, kept: StoredValue) -> Any:
        """The value that :meth:`put` was given."""
        return kept.value if kept.waiting is None else kept.waiting.get()

    def drop(self, kept: StoredValue) -> None:
        """Forget a value and free its room."""
        if kept.waiting is not None:
            kept.waiting.path.unlink()
        else:
            self._used -= kept.size
            self._movable.pop(id(kept), None)

    def shrink(self, limit: int) -> None:
        """From now on keep at most ``limit`` bytes in memory."""
        self._limit = limit
        self._spill()

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.close()

    def _spill(self) -> None:
        """Move the values that came last to disk: values are asked for in the order they came, so these are needed last."""
        while self._used > self._limit and self._movable:
            _, kept = self._movable.popitem()
            if self._folder is None:
                self._folder = temporary()
            path = self._folder.path / f"{self._count}.numbers"
            self._count += 1
            kept.value, kept.waiting = None, Waiting.put(kept.value, path)
            self._used -= kept.size
