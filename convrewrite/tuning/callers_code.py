"""Tells whether a caller's function is the one of an earlier run: by its code, and by all that it holds, which decides as much of
what it does."""

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterable
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

_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)


def code_of(function: Callable[..., object]) -> str | None:
    """The name of a caller's function, and a hash of its code and of what it holds: defaults, what it encloses, the arguments of
    a partial, the state of an object. None where something of that cannot be told, as of a generator or a lock."""
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
        elif isinstance(value, type | types.ModuleType):
            self._add(f"{value.__name__} {_source(value)}")
        elif isinstance(value, _BUILT_IN):
            self._add(getattr(value, "__qualname__", value.__name__))
        else:
            self._tell_object(value)

    def _tell_function(self, function: types.FunctionType) -> None:
        self._add(f"{function.__module__} {function.__qualname__}")
        written = _source(function)
        self._tell_all([written or function.__code__, function.__defaults__, function.__kwdefaults__])
        self._tell_all(cell.cell_contents for cell in function.__closure__ or ())

    def _tell_object(self, value: object) -> None:
        """By what it would be pickled as, of which its parts are not pickled in their turn."""
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            self._add(reduced)
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


def _source(named: Any) -> str:
    """What was written; empty where that cannot be found: typed in at a prompt, not Python's, or a whole module."""
    if isinstance(named, types.ModuleType):
        return ""
    try:
        return inspect.getsource(named)
    except (OSError, TypeError):
        return ""
