"""Everything that holds a part of a model: finding it, and putting something else in its place in every holder.

A module is held by its parent, and may also stand in lists, dictionaries, closures, default arguments, partials, bound methods,
weak references and attributes of other objects. All of these are followed from the model on; what belongs to the process
(modules of Python, classes, functions that can be imported) is not.
"""

import enum
import functools
import gc
import logging
import operator
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from convrewrite.errors import TraceError
from convrewrite.modules.operator import Shared

LIMIT = 1_000_000
"""Most objects that are looked at."""

_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_WEAK_MAPPINGS = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)

CACHED: Any = type(functools.lru_cache(lambda: None))
"""Type of what ``functools.lru_cache`` makes of a function."""

_SELDOM_WITH_ATTRIBUTES = (Tensor, dict, types.FunctionType)
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, range, slice}
)
_OUTSIDE = (
    type, types.ModuleType, types.CodeType, enum.Enum, fx.Graph, fx.Node, Shared, logging.Logger, logging.Handler,
    logging.Manager,
)  # fmt: skip

Of = Callable[[Any], Any]
"""Function from an object to what stands in its place: the object itself where that stays."""


VIEWS: Mapping[type, Callable[[Any], Any]] = {
    types.MappingProxyType: types.MappingProxyType,
    **{
        type(getattr(kind(), name)()): operator.methodcaller(name)
        for kind in (dict, OrderedDict)
        for name in ("keys", "values", "items")
    },
}
"""Types of views of a dictionary -> what makes the same view of another one."""


def reachable(*roots: object, functions: bool = False) -> Iterator[Any]:
    """Every object that can be reached from ``roots``, including these, each once. ``functions``: those that can be imported too,
    but not what they lead to. Raises TraceError beyond ``LIMIT``."""
    seen: dict[int, object] = {}  # holds the objects too, so that their ids are not reused
    waiting: list[Any] = [root for root in roots if not is_plain(root)]

    def note(part: Any) -> Any:
        if not is_plain(part) or (functions and isinstance(part, types.FunctionType)):
            waiting.append(part)
        return part

    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if len(seen) > LIMIT:
            raise TraceError(
                f"the model holds more than {LIMIT:,} objects; take what is no part of it off its attributes"
            )
        yield value
        if not is_plain(value):
            exchanged(value, note)


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put other modules in the places of parts of the model, given by their id, in every holder that can be reached. A new module
    may hold the part that it replaces."""
    stay = {id(module): module for module in replacements.values()}
    replace_parts((model,), stay | dict(replacements))


def replace_parts(roots: tuple[object, ...], replacements: Mapping[int, object]) -> None:
    """Put other objects in the places of those with these ids, wherever ``roots`` hold them.

    Raises TraceError where holders are nested too deep.
    """
    places = _Places(replacements)
    try:
        for root in roots:
            places.visit(root)
    except RecursionError as error:
        raise TraceError(f"{type(roots[0]).__name__}: its parts are nested too deep to be replaced") from error


class _Places:
    def __init__(self, replacements: Mapping[int, object]) -> None:
        self._found: dict[int, Any] = dict(replacements)
        self._alive: list[Any] = []  # so that their ids are not reused

    def of(self, value: Any) -> Any:
        """What stands in the place of a value."""
        if id(value) in self._found:
            self._alive.append(value)  # a weak reference may yet lead to it
            return self._found[id(value)]
        if is_plain(value) or (type(value) in _BARE and not value):  # modules have many empty tables of hooks
            return value
        return self.visit(value)

    def visit(self, value: Any) -> Any:
        self._alive.append(value)
        self._found[id(value)] = value  # for when it is met again on the way
        self._found[id(value)] = made = exchanged(value, self.of)
        return made


def is_plain(value: Any) -> bool:
    """Whether an object holds nothing of a model: numbers, texts, and what belongs to the process."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind in _PROXIES:
        return False
    if issubclass(kind, _OUTSIDE):
        return True
    if kind is types.BuiltinMethodType:
        return isinstance(value.__self__, types.ModuleType | type | None)
    return kind is types.FunctionType and is_importable(value)


def is_importable(value: Any) -> bool:
    """Whether a function is found under its own name in its module: then it belongs to the process, and is no part of a model."""
    home = sys.modules.get(value.__module__ or "")
    found: Any = home
    for name in value.__qualname__.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    return getattr(found, "__func__", found) is value or (home is not None and vars(home).get(value.__name__) is value)


def referent(proxy: Any) -> Any:
    """What a ``weakref.proxy`` stands for; None once it is gone."""
    try:
        return proxy.__repr__.__self__
    except ReferenceError:
        return None


def exchanged(value: Any, of: Of) -> Any:
    """The value with ``of(part)`` in the place of every part that it holds directly: changed in place where that is possible,
    otherwise a new value if any part is another."""
    kind = type(value)
    if kind in _BARE:
        return _BARE[kind](value, of)
    if kind in _PROXIES:
        return _proxy(value, of)
    for known, how in _WAYS:
        if issubclass(kind, known):
            made = how(value, of)
            break
    else:
        made = value
    if made is value:
        _attributes(value, of)
    return made


def items_of(mapping: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """The items of a dictionary, whatever its class makes of ``items``."""
    return list(_table(mapping).items(mapping))


def refill(mapping: dict[Any, Any], items: Iterable[tuple[Any, Any]]) -> None:
    """Give a dictionary these items and no others, whatever its class makes of ``update``."""
    table = _table(mapping)
    table.clear(mapping)
    for key, value in items:
        table.__setitem__(mapping, key, value)


def _table(mapping: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class whose methods work on a dictionary's content. An OrderedDict keeps its order beside it: ``dict.clear`` leaves
    that order behind, and going through the items then ends in a KeyError."""
    return OrderedDict if isinstance(mapping, OrderedDict) else dict


def _mapping(value: dict[Any, Any], of: Of) -> dict[Any, Any]:
    items = items_of(value)
    made = [(of(key), of(part)) for key, part in items]
    if all(key is new for (key, _), (new, _) in zip(items, made, strict=True)):
        for (key, part), (_, new) in zip(items, made, strict=True):
            if new is not part:
                dict.__setitem__(value, key, new)
    else:
        refill(value, made)
    return value


def _weak_mapping(value: Any, of: Of) -> Any:
    for key, part in list(value.items()):
        new_key, new = of(key), of(part)
        if new_key is not key:
            del value[key]
        if new_key is not key or new is not part:
            value[new_key] = new
    return value


def _sequence(value: Any, of: Of) -> Any:
    for index, part in enumerate(list(value)):
        new = of(part)
        if new is not part:
            value[index] = new
    return value


def _set(value: Any, of: Of) -> Any:
    parts = list(value)
    made = [of(part) for part in parts]
    if any(new is not part for part, new in zip(parts, made, strict=True)):
        value.clear()
        value.update(made)
    return value


def _frozen(value: Any, of: Of) -> Any:
    """A tuple, a named one too, or a frozenset."""
    parts = list(value)
    made = [of(part) for part in parts]
    if all(new is part for part, new in zip(parts, made, strict=True)):
        return value
    return value._make(made) if hasattr(value, "_make") else type(value)(made)


def _read_only(value: Any, of: Of) -> Any:
    """A view of a dictionary: only the garbage collector gives access to the dictionary itself."""
    (shown,) = gc.get_referents(value)
    new = of(shown)
    return value if new is shown else VIEWS[type(value)](new)


def _partial(value: Any, of: Of) -> Any:
    parts = (value.func, value.args, value.keywords)
    of(vars(value))
    made = (of(value.func), _frozen(value.args, of), {key: of(part) for key, part in value.keywords.items()})
    changed = made[0] is not parts[0] or made[1] is not parts[1]
    if changed or any(made[2][key] is not part for key, part in parts[2].items()):
        value.__setstate__((*made, vars(value) or None))
    return value


def _function(value: types.FunctionType, of: Of) -> types.FunctionType:
    for cell in value.__closure__ or ():
        of(cell)
    if value.__defaults__:
        made = _frozen(value.__defaults__, of)
        if made is not value.__defaults__:
            value.__defaults__ = made
    if value.__kwdefaults__:
        _mapping(value.__kwdefaults__, of)
    return value


def _cell(value: types.CellType, of: Of) -> types.CellType:
    try:
        part = value.cell_contents
    except ValueError:  # nothing is in it yet
        return value
    new = of(part)
    if new is not part:
        value.cell_contents = new
    return value


def _bound(value: types.MethodType, of: Of) -> types.MethodType:
    owner, function = of(value.__self__), of(value.__func__)
    if owner is value.__self__ and function is value.__func__:
        return value
    name = getattr(function, "__name__", "")
    if getattr(type(value.__self__), name, None) is function:  # the method of a class, and not one put on the object
        function = getattr(type(owner), name, function)
    return types.MethodType(function, owner)


def _builtin(value: Any, of: Of) -> Any:
    """A method of a list, a dictionary and so on."""
    owner = value.__self__
    new = of(owner)
    return value if new is owner else getattr(new, value.__name__)


def _cached(value: Any, of: Of) -> Any:
    new = of(value.__wrapped__)
    if new is value.__wrapped__:
        return value
    return functools.update_wrapper(functools.lru_cache(**value.cache_parameters())(new), new)


def _weak(value: Any, of: Of) -> Any:
    part = value()
    new = of(part)
    if new is part:
        return value
    return type(value)(new) if type(value) in (weakref.ref, weakref.WeakMethod) else value


def _proxy(value: Any, of: Of) -> Any:
    part = referent(value)
    new = of(part)
    return value if new is part else weakref.proxy(new)


def _attributes(value: Any, of: Of) -> None:
    """Exchange those in ``__dict__`` and in slots, without what the class does when an attribute is set."""
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and (held or not isinstance(value, _SELDOM_WITH_ATTRIBUTES)):
        of(held)
    for member in slots_of(value):
        try:
            part = member.__get__(value)
        except AttributeError:  # nothing is in it yet
            continue
        new = of(part)
        if new is not part:
            member.__set__(value, new)


def slots_of(value: Any) -> list[types.MemberDescriptorType]:
    """The slots of an object, which hold attributes outside its ``__dict__``."""
    owners = [owner for owner in type(value).__mro__ if "__slots__" in vars(owner)]
    return [slot for owner in owners for slot in vars(owner).values() if isinstance(slot, types.MemberDescriptorType)]


def _object(value: Any, _of: Of) -> Any:
    """It holds nothing but attributes."""
    return value


_WAYS: tuple[tuple[Any, Callable[[Any, Of], Any]], ...] = (
    ((nn.Module, Tensor), _object),
    (dict, _mapping),
    (_WEAK_MAPPINGS, _weak_mapping),
    (list, _sequence),
    (deque, _sequence),
    (tuple, _frozen),
    (set, _set),
    (frozenset, _frozen),
    (tuple(VIEWS), _read_only),
    (functools.partial, _partial),
    (types.FunctionType, _function),
    (types.CellType, _cell),
    (types.MethodType, _bound),
    (types.BuiltinMethodType, _builtin),
    (CACHED, _cached),
    (weakref.ReferenceType, _weak),
)
"""Ways in which the parts of an object of some type are found and put back; the first that fits counts."""

_BARE: dict[type, Callable[[Any, Of], Any]] = {
    dict: _mapping,
    OrderedDict: _mapping,
    list: _sequence,
    tuple: _frozen,
    set: _set,
}
"""The most common containers, which have no attributes."""
