"""What a file may put on the modules and records it makes: no code, no hooks, and no names that are code.

A state goes straight into an instance's dictionary, past all that a class checks when it is used as it is meant to be.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from convrewrite.escaping import printable
from convrewrite.names import is_name
from convrewrite.pickle_bounds import MOST_LAYERS, Bounds, ExcessiveError, require

LONGEST_NAME = 1_000
_TABLES = {"_modules": nn.Module, "_parameters": nn.Parameter, "_buffers": Tensor}
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict))
_METHODS = (FunctionType, property, classmethod, staticmethod, functools.cached_property)


class StateRules:
    """Looks through states; ``trusted`` classes may be hooks, and what is looked through is charged to ``bounds``."""

    def __init__(self, bounds: Bounds, trusted: tuple[Any, ...]) -> None:
        """One account, one set of classes that the user vouches for."""
        self._bounds = bounds
        self._trusted = trusted

    def require_inert(self, value: Any, state: Mapping[Any, Any]) -> None:
        """Raise ForbiddenError for attributes that would be run, or written into source."""
        if type(value) is OrderedDict:
            require(set(state) <= {"_metadata"}, "it puts attributes on a dictionary")
            return
        self._bounds.spend_entries(state)
        fields = getattr(type(value), "__dataclass_fields__", {})
        for name in state:
            method = name not in fields and isinstance(name, str) and isinstance(_static(value, name), _METHODS)
            require(
                _is_short(name) and is_name(name) and not method,
                f"it puts {printable(repr(name))} in place of the code of a {kind_of(value)}",
            )
        if isinstance(value, nn.Module):
            self._module(value, state)

    def _module(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        what = f"a {type(module).__name__}"
        kinds = tuple(kind for kind in self._trusted if isinstance(kind, type))
        for table in _HOOKS:
            entries = state.get(table, {})
            self._bounds.spend_entries(entries)
            own = isinstance(entries, dict) and all(isinstance(hook, (*kinds, bool)) for hook in entries.values())
            require(own, f"it stores hooks on {what}")
        require(state.get("_compiled_call_impl") is None, f"it puts other code into {what}")
        require(isinstance(state.get("training", False), bool), f"the mode of {what} is no truth value")
        for table, kind in _TABLES.items():
            entries = state.get(table, {})
            require(isinstance(entries, dict), f"the {table[1:]} of {what} are no dictionary")
            self._bounds.spend_entries(entries)
            for name, entry in entries.items():
                shown = printable(repr(name))[:80]
                require(
                    _is_short(name) and is_name(name),
                    f"it calls a part of {what} {shown}, which is no name (letters, digits, _ and -)",
                )
                is_own = isinstance(_static(module, name), _METHODS)
                require(not is_own, f"it puts {name} in place of the code of {what}")
                require(entry is None or isinstance(entry, kind), f"{name} of {what} is no {kind.__name__}")


def require_few_layers(value: Any, state: Mapping[Any, Any]) -> None:
    """Raise ExcessiveError for a recurrent layer of very many layers."""
    layers = state.get("num_layers", 0)
    if not isinstance(value, nn.RNNBase) or (isinstance(layers, int) and layers <= MOST_LAYERS):
        return
    raise ExcessiveError(f"num_layers is {printable(repr(layers))[:40]}, the limit is {MOST_LAYERS}")


def kind_of(value: Any) -> str:
    """The name of a class or function, or of the class of a value."""
    return str(getattr(value, "__qualname__", type(value).__name__))


def _static(value: Any, name: str) -> Any:
    return inspect.getattr_static(type(value), name, None)


def _is_short(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= LONGEST_NAME
