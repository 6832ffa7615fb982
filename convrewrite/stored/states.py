"""What a file may put on the modules and records it makes: no code, no hooks, and no names that are code.

A state goes straight into an instance's dictionary, past everything that its class checks in normal use.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from convrewrite.escaping import printable
from convrewrite.names import is_name
from convrewrite.stored.bounds import MOST_LAYERS, Bounds, ExcessiveError, ForbiddenError, InstancesOnly, require

LONGEST_NAME = 1_000
"""Most letters in the name of a module, a parameter or a buffer, and most bytes in that of a type."""

_TABLES = {"_modules": nn.Module, "_parameters": nn.Parameter, "_buffers": Tensor}
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict))
_METHODS = (FunctionType, property, classmethod, staticmethod, functools.cached_property)

_LABELS = ("type",)
"""Methods of ``nn.Module`` that a text, which cannot be called, may replace: ultralytics keeps a layer's kind there."""

_SCRIPTED = "__overloads__"
"""What ``torch.jit.script`` leaves on every module that it saw: an empty dictionary, as no class of torch has overloads."""


class StateRules:
    """Checks states; instances of ``trusted`` classes may be hooks, and everything checked is charged to ``bounds``."""

    def __init__(self, bounds: Bounds, trusted: tuple[Any, ...]) -> None:
        """One account, one set of classes that the user vouches for."""
        self._bounds = bounds
        self._trusted = trusted
        # A model has the same few names in very many modules.
        self._is_name = functools.cache(is_name)
        self._is_method: Callable[[Any, str], bool] = functools.cache(_is_method)

    def require_inert(self, value: Any, state: Mapping[Any, Any]) -> None:
        """Raise ForbiddenError for attributes that would be run, or written into source."""
        if type(value) is OrderedDict:
            require(set(state) <= {"_metadata"}, "it puts attributes on a dictionary")
            return
        self._bounds.spend_entries(state)
        fields = getattr(type(value), "__dataclass_fields__", {})
        for name, held in state.items():
            usable = _is_short(name) and self._is_name(name)
            inert = (name in _LABELS and type(held) is str) or (name == _SCRIPTED and type(held) is dict and not held)
            if not (inert or (usable and (name in fields or not self._is_method(type(value), name)))):
                raise ForbiddenError(f"it puts {key_shown(name)} in place of the code of a {kind_of(value)}")
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
                if not (_is_short(name) and self._is_name(name)):
                    raise ForbiddenError(
                        f"it calls a part of {what} {key_shown(name)}, which is no name (letters, digits, _ and -)"
                    )
                require(not self._is_method(type(module), name), f"it puts {name} in place of the code of {what}")
                require(entry is None or isinstance(entry, kind), f"{name} of {what} is no {kind.__name__}")


def require_few_layers(value: Any, state: Mapping[Any, Any]) -> None:
    """Raise ExcessiveError for a recurrent layer of very many layers."""
    layers = state.get("num_layers", 0)
    if not isinstance(value, nn.RNNBase) or (isinstance(layers, int) and layers <= MOST_LAYERS):
        return
    found = layers if isinstance(layers, int) else f"a {kind_of(layers)}"
    raise ExcessiveError(f"num_layers is {found}, the limit is {MOST_LAYERS}")


def kind_of(value: Any) -> str:
    """The name of a class or function, or of the class of a value."""
    value = value.kind if isinstance(value, InstancesOnly) else value
    return str(getattr(value, "__qualname__", type(value).__name__))


def key_shown(name: Any) -> str:
    """The key of a dictionary for a message."""
    return printable(repr(name[:80] if isinstance(name, str) else name))[:200]


def _is_method(kind: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(kind, name, None), _METHODS)


def _is_short(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= LONGEST_NAME
