"""What running a model may change in it, and putting that back: numbers, attributes, containers, flags, hooks, generators."""

import gc
import random
import types
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convrewrite.modules.holders import CACHED, is_plain, items_of, reachable, refill, slots_of
from convrewrite.modules.surroundings import Names, surroundings
from convrewrite.state import named_parameters_of

_EMPTY = object()

SHOWN = 3
"""Most names of what has changed."""

MOST_NUMBERS = 1_000_000
"""Most numbers in an array, and in a tensor that the model does not hold, that is kept: larger ones are data and no record."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Numbers and flags of a tensor."""

    numbers: Tensor | None
    requires_grad: bool
    grad: Tensor | None


@dataclass(frozen=True, slots=True)
class _Slots:
    """The slots of an object."""

    owner: Any


class Snapshot:
    """Everything that can be reached from a model, as it was when this was made, with the numbers in its tensors (without
    ``parameters``, only in other tensors), and what runs find beside it."""

    def __init__(self, model: nn.Module, *, parameters: bool = True) -> None:
        self._model = model
        held = list(reachable(model, functions=True))
        self._saved = [
            (value, _saved(value, parameters or not isinstance(value, nn.Parameter))) for value in _kept(held)
        ]
        self._beside = _saved_beside(model, held)

    def restore(self) -> None:
        """Put back what has changed; what has not is not touched."""
        _put_back((*self._saved, *self._beside))

    def numbers_changed(self) -> bool:
        """Whether a tensor has other numbers, where these were copied, or another gradient, or began or ceased to need one."""
        return any(isinstance(value, Tensor) and _differs(value, saved) for value, saved in self._saved)

    def contents_changed(self) -> bool:
        """Whether containers that are no tables of modules, arrays and slots now hold other things."""
        tables = {
            id(table)
            for module in self._model.modules()
            for table in (vars(module), module._parameters, module._buffers, module._modules)
        }
        found = ((value, saved) for value, saved in self._saved if isinstance(value, _CONTAINERS))
        return any(id(value) not in tables and _differs(value, saved) for value, saved in found)

    def changed(self) -> tuple[str, ...]:
        """Names of some of what has changed: buffers, parameters and attributes of the model."""
        labels = {id(table): (name, table) for name, table in _tables(self._model)}
        found: list[str] = []
        for value, saved in self._saved:
            if id(value) in labels and isinstance(value, dict) and _differs(value, saved):
                before = dict(saved)
                keys = [key for key in value if value[key] is not before.get(key, _EMPTY)]
                found += [f"{labels[id(value)][0]}.{key}".lstrip(".") for key in keys]
        held = {id(value): saved for value, saved in self._saved if isinstance(value, Tensor)}
        for name, tensor in (*named_parameters_of(self._model), *self._model.named_buffers()):
            if id(tensor) in held and _differs(tensor, held[id(tensor)]):
                found.append(name)
        others = any(_differs(value, saved) for value, saved in self._saved)
        return tuple(dict.fromkeys(found))[:SHOWN] or (("an object that it holds",) if others else ())


@contextmanager
def surroundings_preserved(model: nn.Module) -> Iterator[None]:
    """Caches in classes and global names that runs of the model, and of copies of it, fill are put back; the model itself is
    left alone."""
    saved = _saved_beside(model, reachable(model, functions=True))
    try:
        yield
    finally:
        _put_back(saved)


@contextmanager
def preserved(*models: object) -> Iterator[None]:
    """Whatever running the modules among ``models`` changes in them is put back."""
    snapshots = [Snapshot(model) for model in models if isinstance(model, nn.Module)]
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()


_CONTAINERS = (dict, list, deque, set, bytearray, array, np.ndarray, _Slots)
_KINDS = (
    *_CONTAINERS, types.CellType, Tensor, torch.Generator, random.Random, np.random.Generator, np.random.RandomState,
    Names, CACHED,
)  # fmt: skip


def _kept(values: Iterable[Any]) -> Iterator[Any]:
    """What among these values, and in them, can be put back."""
    for value in values:
        if isinstance(value, _KINDS) and not (isinstance(value, np.ndarray) and _is_data(value)):
            yield value
        if hasattr(type(value), "__slots__") and slots_of(value):
            yield _Slots(value)


def _saved_beside(model: nn.Module, held: Iterable[Any]) -> list[tuple[Any, Any]]:
    """What runs find beside the model, which holds all that is ``held``."""
    functions = [value for value in held if isinstance(value, types.FunctionType)]
    found = _kept(surroundings(model, functions))
    return [(value, _saved(value, True)) for value in found if not (isinstance(value, Tensor) and _is_data(value))]


def _is_data(numbers: Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether it is larger than what code keeps a record in, or cannot be written to."""
    if isinstance(numbers, Tensor):
        return numbers.numel() > MOST_NUMBERS
    return numbers.size > MOST_NUMBERS or not numbers.flags.writeable


def _put_back(saved: Iterable[tuple[Any, Any]]) -> None:
    for value, before in saved:
        if _differs(value, before):
            _restore(value, before)


def _tables(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in model.named_modules():
        yield name, vars(module)
        yield name, module._buffers


def _saved(value: Any, tensors: bool) -> Any:
    if isinstance(value, dict):
        return items_of(value)
    if isinstance(value, set):
        return set(value)
    if isinstance(value, list | deque):
        return list(value)
    if isinstance(value, bytearray | array | np.ndarray):
        return value.copy() if isinstance(value, np.ndarray) else value[:]
    if isinstance(value, _Slots):
        return [_in_slot(value.owner, slot) for slot in slots_of(value.owner)]
    if isinstance(value, types.CellType):
        return _contents(value)
    if isinstance(value, Names):
        return value.values()
    if isinstance(value, CACHED):
        return _objects_in(value)
    if isinstance(value, Tensor):
        copied = tensors and not value.is_meta and value.layout is torch.strided
        numbers = value.detach().clone() if copied else None
        return _Held(numbers, value.requires_grad, value.grad if value.is_leaf else None)
    return _generator_state(value)


def _in_slot(owner: Any, slot: types.MemberDescriptorType) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:  # nothing is in it yet
        return _EMPTY


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _objects_in(cached: Any) -> dict[int, Any]:
    """The objects for which a function with a cache keeps results, by their ids: a method keeps them for each ``self``, and any
    function that a graph follows for the stand-ins of sizes."""
    tables = [part for part in gc.get_referents(cached) if isinstance(part, dict)]
    keys = [key for table in tables for key in table if isinstance(key, tuple)]
    return {id(part): part for key in keys for part in key if not _is_value(part)}


def _is_value(part: Any) -> bool:
    """Whether it is nothing but numbers, texts and the like; an ``object()`` stands in keys before arguments by name."""
    return is_plain(part) or type(part) is object or (isinstance(part, tuple) and all(map(_is_value, part)))


def _generator_state(value: Any) -> Any:
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state(legacy=False)


def _differs(value: Any, saved: Any) -> bool:
    if isinstance(value, dict):
        return _items_differ(value, saved)
    if isinstance(value, set):
        return bool(value != saved)
    if isinstance(value, list | deque):
        return len(value) != len(saved) or any(part is not old for part, old in zip(value, saved, strict=True))
    if isinstance(value, bytearray | array):
        return bytes(value) != bytes(saved)
    if isinstance(value, np.ndarray):
        return value.shape != saved.shape or value.tobytes() != saved.tobytes()
    if isinstance(value, _Slots):
        return any(
            _in_slot(value.owner, slot) is not old for slot, old in zip(slots_of(value.owner), saved, strict=True)
        )
    if isinstance(value, types.CellType):
        return _contents(value) is not saved
    if isinstance(value, Names):
        now = value.values()
        return now.keys() != saved.keys() or any(now[name] is not saved[name] for name in now)
    if isinstance(value, CACHED):
        return not _objects_in(value).keys() <= saved.keys()
    if isinstance(value, Tensor):
        flags = value.requires_grad != saved.requires_grad or (value.is_leaf and value.grad is not saved.grad)
        return flags or (saved.numbers is not None and not _same_numbers(value, saved.numbers))
    state = _generator_state(value)
    return not torch.equal(state, saved) if isinstance(state, Tensor) else repr(state) != repr(saved)


def _items_differ(mapping: dict[Any, Any], saved: list[tuple[Any, Any]]) -> bool:
    """Most dictionaries of a model are tables of hooks without any: those are told apart without going through items."""
    if dict.__len__(mapping) != len(saved):
        return True
    if not saved:
        return False
    for (key, part), (old_key, old) in zip(items_of(mapping), saved, strict=True):
        if key is not old_key or part is not old:
            return True
    return False


def _same_numbers(value: Tensor, numbers: Tensor) -> bool:
    return value.shape == numbers.shape and value.dtype == numbers.dtype and torch.equal(value.detach(), numbers)


def _restore(value: Any, saved: Any) -> None:
    if isinstance(value, dict):
        refill(value, saved)
    elif isinstance(value, list | bytearray | array):
        value[:] = saved
    elif isinstance(value, np.ndarray):
        _restore_array(value, saved)
    elif isinstance(value, _Slots):
        _refill_slots(value.owner, saved)
    elif isinstance(value, deque | set):
        value.clear()
        value.update(saved) if isinstance(value, set) else value.extend(saved)
    elif isinstance(value, types.CellType):
        if saved is _EMPTY:
            del value.cell_contents
        else:
            value.cell_contents = saved
    elif isinstance(value, Names):
        value.bind(saved)
    elif isinstance(value, CACHED):
        value.cache_clear()  # it would keep copies of the model; it computes again what it is asked for
    elif isinstance(value, Tensor):
        _restore_tensor(value, saved)
    elif isinstance(value, random.Random):
        value.setstate(saved)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = saved
    else:
        value.set_state(saved)


def _restore_array(value: Any, saved: Any) -> None:
    if value.shape != saved.shape:
        value.resize(saved.shape, refcheck=False)
    value[...] = saved


def _refill_slots(owner: Any, saved: list[Any]) -> None:
    for slot, old in zip(slots_of(owner), saved, strict=True):
        if old is not _EMPTY:
            slot.__set__(owner, old)
        elif _in_slot(owner, slot) is not _EMPTY:
            slot.__delete__(owner)


def _restore_tensor(value: Tensor, saved: _Held) -> None:
    with torch.inference_mode(value.is_inference()), torch.no_grad():
        if saved.numbers is not None and not _same_numbers(value, saved.numbers):
            if value.shape == saved.numbers.shape and value.dtype == saved.numbers.dtype:
                value.copy_(saved.numbers)
            else:
                value.data = saved.numbers
    if not value.is_leaf and not saved.requires_grad and not value._is_view():
        value.detach_()  # a buffer that was updated while gradients were taken
    if value.is_leaf:
        value.requires_grad_(saved.requires_grad)
        value.grad = saved.grad
