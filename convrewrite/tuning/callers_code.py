"""Tells whether a caller's function is the one of an earlier run: by its code, and by all that it holds or reads, which decides
as much of what it does. Of installed code, as that of packages, only what is written there counts, not what it reads.
"""

import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convrewrite.stored import raw_bytes

MOST = 10_000
"""Most objects that are looked at: what leads to more, as a whole program's state, is taken for something that cannot be told."""

_PLAIN = (
    type(None), type(...), bool, int, float, complex, str, bytes, range, slice, Enum, PurePath, torch.dtype, torch.device,
    torch.memory_format,
)  # fmt: skip
"""Types whose text tells all of a value."""

_ATTRIBUTE = (*_PLAIN, Tensor, np.ndarray, tuple, list, dict, set, types.FunctionType)
"""Types of the attributes of a class by which objects of it differ in what they do; others are what Python keeps there."""

_PACKAGES = {"site-packages", "dist-packages"}
"""Folders in whose subfolders code is installed."""

_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)


def code_of(function: Callable[..., object]) -> str | None:
    """The name of a caller's function, and a hash of its code and of what it holds: defaults, attributes, what it encloses, the
    globals that it names, the arguments of a partial, the state of an object and the attributes of its class. None where some of
    that cannot be told, as of a generator or a lock."""
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    teller = _Teller()
    try:
        teller.tell(function)
    except Exception:  # from code from elsewhere: a lock refuses with a TypeError, a deep nesting by its depth
        return None
    return f"{named.__qualname__} {teller.digest.hexdigest()}"


class _Teller:
    """Adds everything to one hash; an object that comes again, as in a cycle, counts by its place."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._places: dict[int, int] = {}
        self._held: list[object] = []  # so that no other object gets the same id

    def tell(self, value: Any) -> None:
        """Raises what an object raises that cannot be told."""
        self._add(type(value).__qualname__)
        if isinstance(value, _PLAIN):
            self._add(repr(value))
            return
        if id(value) in self._places:
            self._add(str(self._places[id(value)]))
            return
        if len(self._held) == MOST:
            raise ValueError("too much to tell")
        self._places[id(value)] = len(self._held)
        self._held.append(value)
        self._tell_parts(value)

    def _tell_parts(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add(f"{value.dtype} {tuple(value.shape)}")
            self.digest.update(raw_bytes(value))
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._add(f"{value.dtype} {value.shape}")
            self.digest.update(value.tobytes())
        elif isinstance(value, dict):
            self._tell_all(part for pair in value.items() for part in pair)
        elif isinstance(value, tuple | list):
            self._tell_all(value)
        elif isinstance(value, set | frozenset):
            self._tell_all(sorted(value, key=repr))
        elif isinstance(value, types.CodeType):
            self._tell_all((value.co_code, value.co_names, value.co_consts))
        elif isinstance(value, types.FunctionType):
            self._tell_function(value)
        elif isinstance(value, types.MethodType):
            self._tell_all((value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._tell_all((value.func, value.args, value.keywords))
        elif isinstance(value, type):
            self._tell_class(value)
        elif isinstance(value, types.ModuleType):
            self._add(value.__name__)
        elif isinstance(value, staticmethod | classmethod):
            self.tell(value.__func__)
        elif isinstance(value, property):
            self._tell_all((value.fget, value.fset))
        elif isinstance(value, functools.cached_property):
            self.tell(value.func)
        elif isinstance(value, _BUILT_IN):
            self._add(getattr(value, "__qualname__", value.__name__))
        else:
            self._tell_object(value)

    def _tell_function(self, function: types.FunctionType) -> None:
        self._add(f"{function.__module__} {function.__qualname__}")
        written = _source(function)
        self._tell_all([written, function.__code__, function.__defaults__, function.__kwdefaults__])
        self._tell_all(cell.cell_contents for cell in function.__closure__ or ())
        if not _installed(function.__code__.co_filename):
            self.tell(function.__dict__)
            self._tell_all(part for pair in _read_by(function) for part in pair)

    def _tell_class(self, made: type) -> None:
        self._add(f"{made.__name__} {_source(made)}")
        if _installed(_file(made)):
            return
        self._tell_all(made.__bases__)
        methods = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)
        for name, value in sorted(vars(made).items()):
            if isinstance(value, methods) or (isinstance(value, _ATTRIBUTE) and not name.startswith("__")):
                self._tell_all((name, value))

    def _tell_object(self, value: object) -> None:
        """By what it would be pickled as, of which its parts are not pickled in their turn."""
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            self._add(reduced)
            self.tell(getattr(value, "__wrapped__", None))  # of a function that remembers its results
            return
        made, given, *state = reduced
        self._add(made.__qualname__)
        self._tell_all(given)
        self._tell_all(list(part) if hasattr(part, "__next__") else part for part in state)

    def _tell_all(self, values: Iterable[Any]) -> None:
        """Parts in their order, with their number: one cannot pass into another."""
        found = list(values)
        self._add(str(len(found)))
        for value in found:
            self.tell(value)

    def _add(self, text: str) -> None:
        encoded = text.encode(errors="surrogatepass")
        self.digest.update(len(encoded).to_bytes(8, "big") + encoded)


def _read_by(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """The globals that a function's code names, and of modules that are the caller's own, what it may read there."""
    names = sorted(set(_named_in(function.__code__)))
    for name in names:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, value
        if isinstance(value, types.ModuleType) and not _installed(getattr(value, "__file__", None)):
            yield from ((f"{name}.{inside}", vars(value)[inside]) for inside in names if inside in vars(value))


def _named_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _named_in(inner)


def _installed(file: str | None) -> bool:
    """Whether a file of code is Python's own or a package's; what is built in has none."""
    if file is None or file.startswith(("<frozen ", sysconfig.get_path("stdlib"))):
        return True
    return bool(_PACKAGES & set(PurePath(file).parts))


def _file(made: type) -> str | None:
    """The file of the module that a class is of; empty for one that was typed in."""
    module = sys.modules.get(made.__module__)
    return "" if module is None or made.__module__ == "__main__" else getattr(module, "__file__", None)


def _source(named: Any) -> str:
    """What was written; empty where that cannot be found: typed in at a prompt, or not Python's."""
    try:
        return inspect.getsource(named)
    except (OSError, TypeError):
        return ""
