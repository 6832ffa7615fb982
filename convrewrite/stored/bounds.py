"""What reading a pickle may cost: a file of a kilobyte can ask for tensors of 10**12 numbers, or nest lists 10**5 deep.

Everything a file makes is charged to one account, before it is made, so that time and memory stay in proportion to the file.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from pickle import UnpicklingError
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.values import shape_text

LONGEST_PICKLE = 256 << 20
"""Most bytes of the pickle itself, without the tensors."""

MOST_STEPS = 5_000_000
"""Most opcodes of a pickle; a network of a thousand layers takes some 300,000."""

MOST_ENTRIES = 10_000_000
"""Most entries of all containers that are copied or checked; also, most paths that lead through what a file makes."""

DEEPEST = 400
"""Deepest nesting of containers; a module in a module counts as three."""

SPARE_ELEMENTS = 1 << 24
"""Elements that tensors may have beyond four for each byte of the file, as one that is expanded has more than its storage."""

MOST_LAYERS = 10_000
"""Most layers of a recurrent module: PyTorch loops over them when it is read."""

KEY_BITS = 60
"""Most bits of a whole number that is a key: larger ones can be chosen so that a dictionary of them takes quadratic time."""

MOST_NUMBER_KEYS = 10_000
"""Most keys that contain numbers without being a single number: their hashes can be chosen, too."""

LARGEST_KEY = 1_000
"""Most parts of one key, all levels together: hashing visits every part, even one that occurs many times."""

_LEAVES = frozenset(
    (str, int, float, bool, bytes, complex, bytearray, type(None), torch.dtype, torch.Size, nn.Parameter)
)
_LEADING_OUT = (type, FunctionType, BuiltinFunctionType, ModuleType, Tensor, Enum)
_BYTES_AN_ENTRY = 64
"""Letters or bytes of a text that are charged as one entry of a container."""


class ForbiddenError(UnpicklingError):
    """A file does what saving a model never does; the message is a sentence about the file, "it calls eval"."""


class ForbiddenNameError(ForbiddenError):
    """A file asks for a class or function that it must not have."""


class ExcessiveError(UnpicklingError):
    """Reading a file would take time or memory out of proportion; the message says what, how much, and the limit."""


@dataclass(frozen=True, slots=True)
class InstancesOnly:
    """Stands in for a class of which a file may have instances, but may neither call nor keep it: its constructor runs text."""

    kind: type


def require(holds: bool, otherwise: str) -> None:
    """Raise ForbiddenError with this sentence unless a condition holds."""
    if not holds:
        raise ForbiddenError(otherwise)


class Bounds:
    """What a file of ``size`` bytes may still use.

    ``stored`` are the bytes of every storage of an archive, by key; None for the old format, where storages follow the
    pickle and together are no larger than the file.
    """

    def __init__(self, size: int, stored: Mapping[str, int] | None) -> None:
        """A full account."""
        self._size = size
        self._stored = stored
        self._named: dict[str, int] = {}
        self._bytes = LONGEST_PICKLE
        self._elements = 4 * size + SPARE_ELEMENTS
        self._entries = MOST_ENTRIES
        self._number_keys = MOST_NUMBER_KEYS

    def spend_bytes(self, count: int) -> None:
        """Charge bytes of the pickle that are about to be read."""
        self._bytes -= count
        if self._bytes < 0:
            raise ExcessiveError(f"expected a pickle of at most {LONGEST_PICKLE} bytes, found a longer one")

    def spend_entries(self, *values: Any) -> None:
        """Charge containers and texts that are about to be copied or checked."""
        for value in values:
            if isinstance(value, str | bytes | bytearray):
                self._entries -= len(value) // _BYTES_AN_ENTRY
            elif isinstance(value, dict | list | tuple | set | frozenset):
                self._entries -= len(value)
        if self._entries < 0:
            raise ExcessiveError(f"what it makes has more than {MOST_ENTRIES} entries in all")

    def spend_elements(self, size: Sequence[int]) -> None:
        """Charge a tensor of this shape, which may be much larger than its storage."""
        self._elements -= math.prod(size)
        if self._elements < 0:
            raise ExcessiveError(
                f"with a tensor of shape {shape_text(size)} its tensors have more elements than four for each "
                f"byte of the file and {SPARE_ELEMENTS}"
            )

    def require_storage(self, key: str, wanted: int) -> None:
        """Raise ExcessiveError unless the storage of a key has ``wanted`` bytes or, in the old format, can have them."""
        if self._stored is not None:
            if key not in self._stored:
                raise ValueError(f"storage {key[:40]!r} is missing")
            if self._stored[key] != wanted:
                raise ExcessiveError(f"storage {key[:40]!r} should have {wanted} bytes, found {self._stored[key]}")
        elif key not in self._named:
            self._named[key] = wanted
            self._size -= wanted
            if self._size < 0:
                raise ExcessiveError(
                    f"its storages take more than {sum(self._named.values()) + self._size} bytes, all that the file has"
                )
        elif self._named[key] != wanted:
            raise ExcessiveError(f"storage {key[:40]!r} should have {wanted} bytes, and {self._named[key]} before")

    def require_key(self, key: Any) -> None:
        """Raise ExcessiveError for a key of a dictionary or set whose hash takes long, or can be chosen."""
        kind = type(key)
        if kind is str or kind is bytes or key is None:
            return
        if kind is int:
            if abs(key) >> KEY_BITS:
                raise ExcessiveError(
                    f"it has a key of {key.bit_length()} bits in a dictionary or a set, the limit is {KEY_BITS}"
                )
            return
        if kind is not float and kind is not bool and _holds_numbers(key):
            self._number_keys -= 1
            if self._number_keys < 0:
                raise ExcessiveError(f"more than {MOST_NUMBER_KEYS} keys are made of several numbers")


def require_shape(roots: Iterable[Any]) -> None:
    """Raise ExcessiveError for what is nested too deeply, or reached on too many paths, and for modules within themselves."""
    ways: dict[int, int] = {}
    heights: dict[int, int] = {}
    entered: set[int] = set()
    layers: dict[int, list[int]] = {}
    todo: list[tuple[Any, list[Any] | None]] = [(root, None) for root in roots]
    depth = 0
    while todo:
        value, parts = todo.pop()
        if parts is not None:
            ways[id(value)] = 1 + sum(ways.get(id(part), 1) for part in parts)
            heights[id(value)] = 1 + max((heights.get(id(part), 0) for part in parts), default=0)
            _require_within(ways[id(value)], heights[id(value)])
            depth -= 1
        elif id(value) not in entered and type(value) not in _LEAVES:
            entered.add(id(value))
            depth += 1
            _require_within(0, depth)  # on the way down, too: there may be a million more
            parts = _parts(value)
            todo.append((value, parts))
            inner = {id(part): part for part in parts if type(part) not in _LEAVES}
            todo += [(part, None) for key, part in inner.items() if key not in entered]
            if isinstance(value, nn.Module):
                layers[id(value)] = [id(layer) for layer in vars(value).get("_modules", {}).values()]
    _require_no_cycle(layers)


def _require_no_cycle(layers: Mapping[int, Iterable[int]]) -> None:
    try:
        TopologicalSorter(layers).prepare()
    except CycleError as error:
        raise ExcessiveError("a module is part of itself") from error


def _require_within(ways: int, depth: int) -> None:
    if ways > MOST_ENTRIES:
        raise ExcessiveError(f"more than {MOST_ENTRIES} ways lead through its containers and modules")
    if depth > DEEPEST:
        raise ExcessiveError(f"its containers and modules are nested more than {DEEPEST} deep")


def _parts(value: Any) -> list[Any]:
    """What lies directly within a value that a file made. Raises ForbiddenError for a class that the file must not keep."""
    if isinstance(value, InstancesOnly):
        raise ForbiddenError(f"it keeps the class {value.kind.__name__} itself, besides layers of it")
    if isinstance(value, _LEADING_OUT):
        return []
    parts: list[Any] = []
    if isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts += value
    elif isinstance(value, functools.partial):
        parts += [value.func, value.args, value.keywords]
    if hasattr(value, "__dict__"):
        parts.append(vars(value))
    else:
        parts += [getattr(value, name, None) for name in getattr(value, "__dataclass_fields__", ())]
    return parts


def _holds_numbers(key: Any) -> bool:
    """Whether there are numbers in a key; raises ExcessiveError for one of very many parts, or of too large numbers."""
    found = False
    todo = [(key, 1)]
    for _ in range(LARGEST_KEY):
        if not todo:
            return found
        part, depth = todo.pop()
        if isinstance(part, int | float | complex | range) and not isinstance(part, Enum):
            found = True
        elif type(part) not in _LEAVES or isinstance(part, tuple):
            _require_within(0, depth)
            inner = [] if isinstance(part, nn.Module) else _parts(part)  # a module's hash is its id
            todo += [(one, depth + 1) for one in inner[: LARGEST_KEY + 1]]
    raise ExcessiveError(f"it has a key of more than {LARGEST_KEY} parts in a dictionary or a set")
