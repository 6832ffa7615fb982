"""What the code of a model finds beside the model: attributes of its classes, and the global names that it reads."""

import dis
import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

_OUTSIDE = ("torch", "builtins", "convrewrite")
"""Packages whose classes and global names are none of a model's."""

_INSTALLED = ("site-packages", "dist-packages")
"""Folders of installed packages."""

_BINDING = ("STORE_GLOBAL", "DELETE_GLOBAL")
"""Instructions that put something else under a global name."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names to which code may give other values, as it counts calls: ``some`` global ones, or all those of a class."""

    owner: type | dict[str, Any]
    some: frozenset[str] = frozenset()

    def values(self) -> dict[str, Any]:
        """What they are bound to now. What Python itself notes in a class is left out."""
        if isinstance(self.owner, type):
            return {name: value for name, value in vars(self.owner).items() if not name.startswith("__")}
        return {name: self.owner[name] for name in self.some & self.owner.keys()}

    def bind(self, values: Mapping[str, Any]) -> None:
        """Bind them to these values, and no others."""
        now = self.values()
        for name in now.keys() - values.keys():
            type.__delattr__(self.owner, name) if isinstance(self.owner, type) else self.owner.pop(name)
        for name, value in values.items():
            if name in now and now[name] is value:
                continue
            if isinstance(self.owner, type):
                type.__setattr__(self.owner, name, value)
            else:
                self.owner[name] = value


def surroundings(model: nn.Module, functions: Iterable[types.FunctionType]) -> list[Any]:
    """What the classes of the model's modules hold; and what the global names hold that their methods read, and the ``functions``
    that the model holds, as its hooks are, and the user's own functions that any of these call. Each object once; and names that
    such code binds, as :class:`Names`."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    held = [value for kind in kinds if not _is_outside(kind.__module__) for value in vars(kind).values()]
    own = [Names(kind) for kind in kinds if _is_users(_namespace(kind))]
    found = {id(value): value for value in (*held, *own)}
    waiting = [value for value in map(_function_of, held) if value is not None]
    hooks = list(_global_hooks())
    found |= {id(part): part for hook in hooks for part in _attributes_of(hook)}
    waiting += [
        one for one in (*functions, *map(_function_of, hooks)) if one is not None and _is_users(one.__globals__)
    ]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for value in _used(function):
            found[id(value)] = value
            if isinstance(value, types.FunctionType) and _is_users(value.__globals__):
                waiting.append(value)
    return list(found.values())


def _global_hooks() -> Iterator[Any]:
    """Hooks that torch calls for every module, and so for those of a copy."""
    tables = [table for name, table in vars(torch_modules).items() if name.startswith("_global_")]
    return (hook for table in tables if isinstance(table, dict) for hook in list(table.values()))


def _attributes_of(hook: Any) -> Iterator[Any]:
    """The attributes of the object whose method a hook is, and what they hold."""
    attributes = getattr(getattr(hook, "__self__", None), "__dict__", None)
    if isinstance(attributes, dict):
        yield attributes
        yield from attributes.values()


def _function_of(value: Any) -> types.FunctionType | None:
    """The function that an attribute of a class, or a hook, stands for."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, staticmethod | classmethod | types.MethodType):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def _used(function: types.FunctionType) -> Iterator[Any]:
    """What a function holds in cells, as one that a decorator made does, and what it reads by global names: themselves, and their
    attributes where they are modules and classes of the user's."""
    for cell in function.__closure__ or ():
        yield cell
        yield from _contents(cell)
    names, attributes = _names(function.__code__)
    if _is_outside(function.__globals__.get("__name__", "")):
        return
    bound = _names_bound(function.__code__)
    if bound and _is_users(function.__globals__):
        yield Names(function.__globals__, bound)
    for value in (function.__globals__.get(name) for name in names):
        yield value
        if isinstance(value, type | types.ModuleType) and _is_users(_namespace(value)):
            yield from (vars(value)[name] for name in attributes & vars(value).keys())


def _contents(cell: types.CellType) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # nothing is in it yet
        return


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a function and the functions within it read; and the other names, which are those of attributes."""
    read = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    attributes = frozenset(code.co_names).union(*(others for _, others in inner))
    return frozenset(read).union(*(names for names, _ in inner)), attributes


@functools.lru_cache(maxsize=4096)
def _names_bound(code: types.CodeType) -> frozenset[str]:
    """The global names that a function and the functions within it bind."""
    bound = {step.argval for step in dis.get_instructions(code) if step.opname in _BINDING}
    return frozenset(bound).union(*(_names_bound(part) for part in code.co_consts if isinstance(part, types.CodeType)))


def _namespace(value: type | types.ModuleType) -> Mapping[str, Any]:
    """The global names beside a class, or in a module."""
    if isinstance(value, types.ModuleType):
        return vars(value)
    return vars(sys.modules[value.__module__]) if value.__module__ in sys.modules else {}


def _is_users(namespace: Mapping[str, Any]) -> bool:
    """Whether code with these global names is of the user's own, and not of an installed package: what such a package keeps, it
    may keep in several places, which have to stay with one another."""
    name, file = str(namespace.get("__name__")), str(namespace.get("__file__"))
    comes_along = _is_outside(name) or name.partition(".")[0] in sys.stdlib_module_names
    return not comes_along and not any(part in file for part in _INSTALLED)


def _is_outside(module: str) -> bool:
    return module.partition(".")[0] in _OUTSIDE
