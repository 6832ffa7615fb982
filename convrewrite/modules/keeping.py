"""How each kind of object is kept and put back: what is saved of it, whether it differs from that, and how it gets it again."""

import gc
import random
import types
from array import array
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convrewrite.modules.holders import CACHED, is_plain, items_of, refill, slots_of
from convrewrite.modules.surroundings import Names

_EMPTY = object()


class Way:
    """The way of one kind of object."""

    @staticmethod
    def saved(value: Any) -> Any:
        """What it holds now: its parts themselves, and copies of numbers."""
        raise NotImplementedError

    @staticmethod
    def differs(value: Any, saved: Any) -> bool:
        """Whether it now holds something else."""
        raise NotImplementedError

    @staticmethod
    def restore(value: Any, saved: Any) -> None:
        """Let it hold this again."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Kept:
    """An object, and what is saved of it in the ``way`` of its kind."""

    value: Any
    way: type[Way]
    saved: Any

    @classmethod
    def of(cls, value: Any, way: type[Way], *, numbers: bool = True) -> "Kept":
        """The object as it is now; ``numbers``: of a tensor also its numbers, not its flags alone."""
        chosen = _Flags if way is _Tensor and not numbers else way
        return cls(value, chosen, chosen.saved(value))

    def differs(self) -> bool:
        """Whether the object now holds something else."""
        return self.way.differs(self.value, self.saved)

    def put_back(self) -> None:
        """What has not changed is not touched."""
        if self.differs():
            self.way.restore(self.value, self.saved)


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of an object."""

    owner: Any


def _in_slot(owner: Any, slot: types.MemberDescriptorType) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:  # nothing is in it yet
        return _EMPTY


def _same_objects(parts: Any, others: Any) -> bool:
    return all(part is other for part, other in zip(parts, others, strict=True))


class _Mapping(Way):
    @staticmethod
    def saved(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
        return items_of(value)

    @staticmethod
    def differs(value: dict[Any, Any], saved: list[tuple[Any, Any]]) -> bool:
        """Most dictionaries of a model are tables of hooks without any: those are told apart without going through items."""
        if dict.__len__(value) != len(saved):
            return True
        if not saved:
            return False
        return any(
            key is not old_key or part is not old
            for (key, part), (old_key, old) in zip(items_of(value), saved, strict=True)
        )

    @staticmethod
    def restore(value: dict[Any, Any], saved: list[tuple[Any, Any]]) -> None:
        refill(value, saved)


class _Set(Way):
    @staticmethod
    def saved(value: set[Any]) -> set[Any]:
        return set(value)

    @staticmethod
    def differs(value: set[Any], saved: set[Any]) -> bool:
        return bool(value != saved)

    @staticmethod
    def restore(value: set[Any], saved: set[Any]) -> None:
        value.clear()
        value.update(saved)


class _List(Way):
    @staticmethod
    def saved(value: Any) -> list[Any]:
        return list(value)

    @staticmethod
    def differs(value: Any, saved: list[Any]) -> bool:
        return len(value) != len(saved) or not _same_objects(value, saved)

    @staticmethod
    def restore(value: list[Any], saved: list[Any]) -> None:
        value[:] = saved


class _Deque(_List):
    @staticmethod
    def restore(value: Any, saved: list[Any]) -> None:
        value.clear()
        value.extend(saved)


class _Bytes(Way):
    """Byte arrays, and arrays of Python's own."""

    @staticmethod
    def saved(value: Any) -> Any:
        return value[:]

    @staticmethod
    def differs(value: Any, saved: Any) -> bool:
        return bytes(value) != bytes(saved)

    @staticmethod
    def restore(value: Any, saved: Any) -> None:
        value[:] = saved


class _Array(Way):
    @staticmethod
    def saved(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return value.copy()

    @staticmethod
    def differs(value: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> bool:
        return value.shape != saved.shape or value.tobytes() != saved.tobytes()

    @staticmethod
    def restore(value: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> None:
        if value.shape != saved.shape:
            value.resize(saved.shape, refcheck=False)
        value[...] = saved


class InSlots(Way):
    """The contents of the slots of an object."""

    @staticmethod
    def saved(value: Slots) -> list[Any]:
        """What is in them, slot by slot."""
        return [_in_slot(value.owner, slot) for slot in slots_of(value.owner)]

    @staticmethod
    def differs(value: Slots, saved: list[Any]) -> bool:
        """Whether one holds another object, or none."""
        return not _same_objects(InSlots.saved(value), saved)

    @staticmethod
    def restore(value: Slots, saved: list[Any]) -> None:
        """Fill them again, and empty those that were empty."""
        for slot, old in zip(slots_of(value.owner), saved, strict=True):
            if old is not _EMPTY:
                slot.__set__(value.owner, old)
            elif _in_slot(value.owner, slot) is not _EMPTY:
                slot.__delete__(value.owner)


class _Cell(Way):
    """A variable that a function encloses."""

    @staticmethod
    def saved(value: types.CellType) -> Any:
        try:
            return value.cell_contents
        except ValueError:
            return _EMPTY

    @staticmethod
    def differs(value: types.CellType, saved: Any) -> bool:
        return _Cell.saved(value) is not saved

    @staticmethod
    def restore(value: types.CellType, saved: Any) -> None:
        if saved is _EMPTY:
            del value.cell_contents
        else:
            value.cell_contents = saved


class _Names(Way):
    @staticmethod
    def saved(value: Names) -> Any:
        return value.values()

    @staticmethod
    def differs(value: Names, saved: Any) -> bool:
        now = value.values()
        return now.keys() != saved.keys() or any(now[name] is not saved[name] for name in now)

    @staticmethod
    def restore(value: Names, saved: Any) -> None:
        value.bind(saved)


class _Cache(Way):
    """A function that keeps its results."""

    @staticmethod
    def saved(value: Any) -> dict[int, Any]:
        """The objects for which it keeps results, by their ids: a method keeps them for each ``self``, and any function that a
        graph follows for the stand-ins of sizes."""
        tables = [part for part in gc.get_referents(value) if isinstance(part, dict)]
        keys = [key for table in tables for key in table if isinstance(key, tuple)]
        return {id(part): part for key in keys for part in key if not _is_value(part)}

    @staticmethod
    def differs(value: Any, saved: dict[int, Any]) -> bool:
        return not _Cache.saved(value).keys() <= saved.keys()

    @staticmethod
    def restore(value: Any, saved: dict[int, Any]) -> None:  # noqa: ARG004
        value.cache_clear()  # it would keep copies of the model; it computes again what it is asked for


def _is_value(part: Any) -> bool:
    """Whether it is nothing but numbers, texts and the like; an ``object()`` stands in keys before arguments by name."""
    return is_plain(part) or type(part) is object or (isinstance(part, tuple) and all(map(_is_value, part)))


@dataclass(frozen=True, slots=True)
class _Held:
    """Numbers, where they are copied, and flags of a tensor."""

    numbers: Tensor | None
    requires_grad: bool
    grad: Tensor | None


class _Flags(Way):
    """Whether a tensor needs a gradient, and its gradient."""

    @staticmethod
    def saved(value: Tensor) -> _Held:
        return _Held(None, value.requires_grad, value.grad if value.is_leaf else None)

    @staticmethod
    def differs(value: Tensor, saved: _Held) -> bool:
        return value.requires_grad != saved.requires_grad or (value.is_leaf and value.grad is not saved.grad)

    @staticmethod
    def restore(value: Tensor, saved: _Held) -> None:
        if not value.is_leaf and not saved.requires_grad and not value._is_view():
            value.detach_()  # a buffer that was updated while gradients were taken
        if value.is_leaf:
            value.requires_grad_(saved.requires_grad)
            value.grad = saved.grad


class _Tensor(Way):
    """Its numbers and its flags."""

    @staticmethod
    def saved(value: Tensor) -> _Held:
        copied = not value.is_meta and value.layout is torch.strided
        flags = _Flags.saved(value)
        return _Held(value.detach().clone() if copied else None, flags.requires_grad, flags.grad)

    @staticmethod
    def differs(value: Tensor, saved: _Held) -> bool:
        other = saved.numbers is not None and not _same_numbers(value, saved.numbers)
        return other or _Flags.differs(value, saved)

    @staticmethod
    def restore(value: Tensor, saved: _Held) -> None:
        with torch.inference_mode(value.is_inference()), torch.no_grad():
            if saved.numbers is not None and not _same_numbers(value, saved.numbers):
                if value.shape == saved.numbers.shape and value.dtype == saved.numbers.dtype:
                    value.copy_(saved.numbers)
                else:
                    value.data = saved.numbers
        _Flags.restore(value, saved)


def _same_numbers(value: Tensor, numbers: Tensor) -> bool:
    return value.shape == numbers.shape and value.dtype == numbers.dtype and torch.equal(value.detach(), numbers)


class _TorchGenerator(Way):
    @staticmethod
    def saved(value: torch.Generator) -> Tensor:
        return value.get_state()

    @staticmethod
    def differs(value: torch.Generator, saved: Tensor) -> bool:
        return not torch.equal(value.get_state(), saved)

    @staticmethod
    def restore(value: torch.Generator, saved: Tensor) -> None:
        value.set_state(saved)


class _PythonGenerator(Way):
    @staticmethod
    def saved(value: random.Random) -> Any:
        return value.getstate()

    @staticmethod
    def differs(value: random.Random, saved: Any) -> bool:
        return bool(value.getstate() != saved)

    @staticmethod
    def restore(value: random.Random, saved: Any) -> None:
        value.setstate(saved)


class _NumpyGenerator(Way):
    """Generators of numpy, of both of its kinds."""

    @staticmethod
    def saved(value: Any) -> Any:
        return value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state(legacy=False)

    @staticmethod
    def differs(value: Any, saved: Any) -> bool:
        # States hold arrays, which do not compare to one truth.
        return repr(_NumpyGenerator.saved(value)) != repr(saved)

    @staticmethod
    def restore(value: Any, saved: Any) -> None:
        if isinstance(value, np.random.Generator):
            value.bit_generator.state = saved
        else:
            value.set_state(saved)


CONTAINERS = (dict, list, deque, set, bytearray, array, np.ndarray, Slots)
"""Kinds that hold parts or numbers of their own."""

_WAYS: dict[type, type[Way]] = {
    dict: _Mapping,
    list: _List,
    Tensor: _Tensor,
    types.CellType: _Cell,
    set: _Set,
    deque: _Deque,
    bytearray: _Bytes,
    array: _Bytes,
    np.ndarray: _Array,
    Names: _Names,
    CACHED: _Cache,
    torch.Generator: _TorchGenerator,
    random.Random: _PythonGenerator,
    np.random.Generator: _NumpyGenerator,
    np.random.RandomState: _NumpyGenerator,
}
_KINDS = tuple(_WAYS)


def way_of(value: Any) -> type[Way] | None:
    """The way of an object's kind, or of the kind that its class derives from; None for what cannot be put back, or holds
    nothing that runs change."""
    way = _WAYS.get(type(value))
    if way is not None or not isinstance(value, _KINDS):
        return way
    return next(way for kind, way in _WAYS.items() if isinstance(value, kind))
