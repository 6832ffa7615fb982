"""What running a model may change in it, and putting that back: numbers, attributes, containers, flags, hooks, generators."""

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from convrewrite.modules.holders import reachable, slots_of
from convrewrite.modules.keeping import CONTAINERS, InSlots, Kept, Slots, Way, way_of
from convrewrite.modules.surroundings import surroundings
from convrewrite.state import named_parameters_of

SHOWN = 3
"""Most names of what has changed."""

MOST_NUMBERS = 1_000_000
"""Most numbers in an array, and in a tensor that the model does not hold, that is kept: larger ones are data and no record."""


class Snapshot:
    """Everything that can be reached from a model, as it was when this was made, with the numbers in its tensors (without
    ``parameters``, only in other tensors), and what runs find beside it."""

    def __init__(self, model: nn.Module, *, parameters: bool = True) -> None:
        self._model = model
        held = list(reachable(model, functions=True))
        self._kept = [
            Kept.of(value, way, numbers=parameters or not isinstance(value, nn.Parameter))
            for value, way in _can_be_kept(held)
        ]
        self._beside = _kept_beside(model, held)

    def restore(self) -> None:
        """Put back what has changed; what has not is not touched."""
        _put_back((*self._kept, *self._beside))

    def numbers_changed(self) -> bool:
        """Whether a tensor has other numbers, where these were copied, or another gradient, or began or ceased to need one."""
        return any(isinstance(one.value, Tensor) and one.differs() for one in self._kept)

    def contents_changed(self) -> bool:
        """Whether containers that are no tables of modules, arrays and slots now hold other things."""
        tables = {
            id(table)
            for module in self._model.modules()
            for table in (vars(module), module._parameters, module._buffers, module._modules)
        }
        found = (one for one in self._kept if isinstance(one.value, CONTAINERS))
        return any(id(one.value) not in tables and one.differs() for one in found)

    def changed(self) -> tuple[str, ...]:
        """Names of some of what has changed: buffers, parameters and attributes of the model."""
        labels = {id(table): (name, table) for name, table in _tables(self._model)}
        found: list[str] = []
        for one in self._kept:
            if id(one.value) in labels and isinstance(one.value, dict) and one.differs():
                before = dict(one.saved)
                keys = [key for key in one.value if key not in before or one.value[key] is not before[key]]
                found += [f"{labels[id(one.value)][0]}.{key}".lstrip(".") for key in keys]
        held = {id(one.value): one for one in self._kept if isinstance(one.value, Tensor)}
        for name, tensor in (*named_parameters_of(self._model), *self._model.named_buffers()):
            if id(tensor) in held and held[id(tensor)].differs():
                found.append(name)
        others = any(one.differs() for one in self._kept)
        return tuple(dict.fromkeys(found))[:SHOWN] or (("an object that it holds",) if others else ())


@contextmanager
def surroundings_preserved(model: nn.Module) -> Iterator[None]:
    """Caches in classes and global names that runs of the model, and of copies of it, fill are put back; the model itself is
    left alone."""
    kept = _kept_beside(model, reachable(model, functions=True))
    try:
        yield
    finally:
        _put_back(kept)


@contextmanager
def preserved(*models: object) -> Iterator[None]:
    """Whatever running the modules among ``models`` changes in them is put back."""
    snapshots = [Snapshot(model) for model in models if isinstance(model, nn.Module)]
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()


def _can_be_kept(values: Iterable[Any]) -> Iterator[tuple[Any, type[Way]]]:
    """What among these values, and in them, can be put back, and in which way."""
    for value in values:
        way = way_of(value)
        if way is not None and not (isinstance(value, np.ndarray) and _is_data(value)):
            yield value, way
        if hasattr(type(value), "__slots__") and slots_of(value):
            yield Slots(value), InSlots


def _kept_beside(model: nn.Module, held: Iterable[Any]) -> list[Kept]:
    """What runs find beside the model, which holds all that is ``held``."""
    functions = [value for value in held if isinstance(value, types.FunctionType)]
    found = _can_be_kept(surroundings(model, functions))
    return [Kept.of(value, way) for value, way in found if not (isinstance(value, Tensor) and _is_data(value))]


def _is_data(numbers: Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether it is larger than what code keeps a record in, or cannot be written to."""
    if isinstance(numbers, Tensor):
        return numbers.numel() > MOST_NUMBERS
    return numbers.size > MOST_NUMBERS or not numbers.flags.writeable


def _put_back(kept: Iterable[Kept]) -> None:
    for one in kept:
        one.put_back()


def _tables(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in model.named_modules():
        yield name, vars(module)
        yield name, module._buffers
