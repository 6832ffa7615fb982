"""What running a model may change in it, and putting that back: tensors, attributes, containers, flags, hooks, generators."""

import dis
import functools
import random
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convrewrite.modules.holders import items_of, reachable, refill
from convrewrite.state import named_parameters_of

_EMPTY = object()

SHOWN = 3
"""Most names of what has changed."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Numbers and flags of a tensor."""

    numbers: Tensor | None
    requires_grad: bool
    grad: Tensor | None


class Snapshot:
    """Everything that can be reached from a model, as it was when this was made.

    ``tensors``: copies of the numbers in tensors too (without ``parameters``, only in other tensors); otherwise only what
    holds what.
    """

    def __init__(self, model: nn.Module, *, tensors: bool = True, parameters: bool = True) -> None:
        self._model = model
        held = [value for value in reachable(model) if isinstance(value, _KINDS)]
        self._saved = [
            (value, _saved(value, tensors and (parameters or not isinstance(value, nn.Parameter)))) for value in held
        ]
        self._beside = [(value, _saved(value, False)) for value in _beside(model)]

    def restore(self) -> None:
        """Put back what has changed; what has not is not touched."""
        for value, saved in (*self._saved, *self._beside):
            if _differs(value, saved):
                _restore(value, saved)

    def restore_beside(self) -> None:
        """Put back only what the classes of the model and the global names in their methods hold."""
        for value, saved in self._beside:
            if _differs(value, saved):
                _restore(value, saved)

    def numbers_changed(self) -> bool:
        """Whether a tensor has other numbers, where these were copied, or another gradient, or began or ceased to need one."""
        return any(isinstance(value, Tensor) and _differs(value, saved) for value, saved in self._saved)

    def contents_changed(self) -> bool:
        """Whether lists, sets and dictionaries that are no tables of modules now hold other things."""
        tables = {
            id(table)
            for module in self._model.modules()
            for table in (vars(module), module._parameters, module._buffers, module._modules)
        }
        found = ((value, saved) for value, saved in self._saved if isinstance(value, dict | list | deque | set))
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
    snapshot = Snapshot(model, tensors=False)
    try:
        yield
    finally:
        snapshot.restore_beside()


@contextmanager
def preserved(*models: object) -> Iterator[None]:
    """Whatever running the modules among ``models`` changes in them is put back."""
    snapshots = [Snapshot(model) for model in models if isinstance(model, nn.Module)]
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()


_KINDS = (
    dict, list, deque, set, types.CellType, Tensor, torch.Generator, random.Random, np.random.Generator, np.random.RandomState,
)  # fmt: skip


def _beside(model: nn.Module) -> Iterator[Any]:
    """Dictionaries, lists and sets that forwards find beside the model: attributes of its classes, and the global names that
    these classes' methods use."""
    seen: set[int] = set()
    for owner in {owner for module in model.modules() for owner in type(module).__mro__}:
        if owner.__module__.partition(".")[0] in ("torch", "builtins", "convrewrite"):
            continue
        methods = [value for value in vars(owner).values() if isinstance(value, types.FunctionType)]
        found = [method.__globals__.get(name) for method in methods for name in _global_names(method.__code__)]
        for value in (*vars(owner).values(), *found):
            if isinstance(value, dict | list | set | deque) and id(value) not in seen:
                seen.add(id(value))
                yield value


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> frozenset[str]:
    """The global names that a function reads, and the functions in it: ``co_names`` has those of attributes too."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (_global_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return frozenset(own).union(*inner)


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
    if isinstance(value, types.CellType):
        return _contents(value)
    if isinstance(value, Tensor):
        copied = tensors and not value.is_meta and value.layout is torch.strided
        numbers = value.detach().clone() if copied else None
        return _Held(numbers, value.requires_grad, value.grad if value.is_leaf else None)
    return _generator_state(value)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


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
    if isinstance(value, types.CellType):
        return _contents(value) is not saved
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
    elif isinstance(value, list):
        value[:] = saved
    elif isinstance(value, deque | set):
        value.clear()
        value.update(saved) if isinstance(value, set) else value.extend(saved)
    elif isinstance(value, types.CellType):
        if saved is _EMPTY:
            del value.cell_contents
        else:
            value.cell_contents = saved
    elif isinstance(value, Tensor):
        _restore_tensor(value, saved)
    elif isinstance(value, random.Random):
        value.setstate(saved)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = saved
    else:
        value.set_state(saved)


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
