"""An unpickler for model files: it makes what saving a model writes, in the way saving writes it, and nothing else.

A list of harmless classes is not enough: a pickle calls what is on it with arguments of its own, and puts attributes of its
own on what it made. Here a class of modules is never called, only filled with its state, as ``torch.save`` stores it; of
functions only the few that tensors and plain values need are called, each with the arguments it has there; and what was made
is looked through at the end: no attribute may stand in place of a method, no hook may be stored, no name may be code.
"""

import _compat_pickle
import codecs
import functools
import inspect
import pickle
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convrewrite.escaping import printable
from convrewrite.names import is_name

LONGEST_RANGE = 1 << 20
_CONTAINERS = (list, tuple, dict, OrderedDict, str, bytes)
_PLAIN_VALUES = (int, float, str, bytes, bool, complex, type(None), torch.dtype, torch.Size)
_TABLES = {"_modules": nn.Module, "_parameters": nn.Parameter, "_buffers": Tensor}
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict))
_METHODS = (FunctionType, property, classmethod, staticmethod, functools.cached_property)
_OPCODES = (
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_DICT "
    "EMPTY_LIST EMPTY_TUPLE EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPERSID BINGET "
    "LONG_BINGET BINPUT LONG_BINPUT GLOBAL REDUCE NEWOBJ BUILD"
)
"""What ``torch.save`` writes, in pickle's second protocol; everything else is refused."""

Make = Callable[..., Any]


class ForbiddenError(pickle.UnpicklingError):
    """A file does what saving a model never does; the message is a sentence about the file, "it calls eval"."""


class ModelPickle:
    """Stands in for the module ``pickle`` where ``torch.load`` asks for one: its ``Unpickler`` is the one described above.

    ``allowed`` are the values a file may ask for by name, besides what every file of tensors needs; ``vouched`` are those
    among them that may be called with any arguments, unless they are modules, and be hooks.
    """

    def __init__(self, allowed: Mapping[str, Any], vouched: Collection[Any]) -> None:
        """Values by the name under which files know them."""

        class Unpickler(_Unpickler):
            known = allowed
            trusted = tuple(vouched)

        self.Unpickler = Unpickler
        self.__name__ = __name__


class _Unpickler(pickle._Unpickler):  # the one in Python, whose steps can be replaced
    known: Mapping[str, Any]
    trusted: tuple[Any, ...]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made: list[Any] = []
        self._unfilled: set[int] = set()

    def load(self) -> Any:
        loaded = super().load()
        for value in self._made:
            self._inspect(value, getattr(value, "__dict__", {}))
        return loaded

    def find_class(self, module: str, name: str) -> Any:
        renamed = (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        full = ".".join(_compat_pickle.NAME_MAPPING.get((module, name), renamed))
        if full in self.known:
            return self.known[full]
        if full in _BASE:
            return _BASE[full]
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype | torch.qscheme):
            return value
        raise ForbiddenError(f"it asks for {full}")

    def call(self) -> None:
        """REDUCE."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(arguments, tuple):
            raise ForbiddenError("it calls something without arguments")
        self.stack[-1] = self._keep(self._maker(function)(*arguments))

    def create(self) -> None:
        """NEWOBJ."""
        arguments = self.stack.pop()
        kind = self.stack.pop()
        if not (isinstance(kind, type) and any(kind is value for value in self.known.values())):
            raise ForbiddenError(f"it makes a {_kind(kind)}")
        is_tuple = issubclass(kind, tuple)
        if issubclass(kind, Enum) or not (isinstance(arguments, tuple) and (is_tuple or arguments == ())):
            raise ForbiddenError(f"it makes a {kind.__name__} in another way than saving does")
        self.stack.append(self._keep(kind.__new__(kind, *arguments)))

    def fill(self) -> None:
        """BUILD."""
        state = self.stack.pop()
        value = self.stack[-1]
        _require(id(value) in self._unfilled, f"it changes a {_kind(value)}")
        self._unfilled.remove(id(value))
        if isinstance(value, functools.partial):
            _require(_is_state_of(value, state), "it changes a function")
            return
        if isinstance(state, dict):
            self._inspect(value, state)
        if hasattr(type(value), "__setstate__"):
            value.__setstate__(state)
        else:
            _require(isinstance(state, dict) and hasattr(value, "__dict__"), f"it changes a {_kind(value)}")
            vars(value).update(state)

    def put_item(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self._target(dict, OrderedDict, defaultdict, Counter)[key] = value

    def put_items(self) -> None:
        """SETITEMS."""
        items = self.pop_mark()
        target = self._target(dict, OrderedDict, defaultdict, Counter)
        for index in range(0, len(items), 2):
            target[items[index]] = items[index + 1]

    def append_item(self) -> None:
        """APPEND."""
        value = self.stack.pop()
        self._target(list).append(value)

    def append_items(self) -> None:
        """APPENDS."""
        items = self.pop_mark()
        self._target(list).extend(items)

    def _target(self, *kinds: type) -> Any:
        _require(type(self.stack[-1]) in kinds, f"it adds to a {_kind(self.stack[-1])}")
        return self.stack[-1]

    def _maker(self, function: Any) -> Make:
        """What is called for a function of the file, which is the function itself only where any arguments will do."""
        for known, maker in _CALLS:
            if function is known:
                return maker
        if any(function is value for value in self.known.values()):
            if function is functools.partial:
                return self._partial
            vouched = any(function is one for one in self.trusted)
            if vouched and not (isinstance(function, type) and issubclass(function, nn.Module)):
                return function
            if isinstance(function, type) and issubclass(function, Enum):
                return lambda value: function(value)
        raise ForbiddenError(f"it calls {_kind(function)}")

    def _partial(self, function: Any, *more: Any) -> Any:
        allowed = isinstance(function, functools.partial) or any(function is value for value in self.known.values())
        _require(allowed and not more, "it binds arguments to something else than a layer")
        return functools.partial(function)

    def _keep(self, value: Any) -> Any:
        """Remember what may be filled, or has to be looked through."""
        if isinstance(value, nn.Module | functools.partial | OrderedDict) or self._is_record(value):
            self._made.append(value)
            self._unfilled.add(id(value))
        return value

    def _is_record(self, value: Any) -> bool:
        own = type(value)
        return any(own is known for known in self.known.values()) and not isinstance(value, Enum | Tensor)

    def _inspect(self, value: Any, state: Mapping[Any, Any]) -> None:
        """Raise ForbiddenError for attributes that would be run, or written into source."""
        if type(value) is OrderedDict:
            _require(set(state) <= {"_metadata"}, "it puts attributes on a dictionary")
            return
        fields = getattr(type(value), "__dataclass_fields__", {})
        for name in state:
            method = name not in fields and isinstance(name, str) and isinstance(_static(value, name), _METHODS)
            _require(
                is_name(name) and not method,
                f"it puts {printable(repr(name))} in place of the code of a {_kind(value)}",
            )
        if isinstance(value, nn.Module):
            self._inspect_module(value, state)

    def _inspect_module(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        what = f"a {type(module).__name__}"
        kinds = tuple(kind for kind in self.trusted if isinstance(kind, type))
        for table in _HOOKS:
            entries = state.get(table, {})
            own = isinstance(entries, dict) and all(isinstance(hook, (*kinds, bool)) for hook in entries.values())
            _require(own, f"it stores hooks on {what}")
        _require(state.get("_compiled_call_impl") is None, f"it puts other code into {what}")
        _require(isinstance(state.get("training", False), bool), f"the mode of {what} is no truth value")
        for table, kind in _TABLES.items():
            entries = state.get(table, {})
            _require(isinstance(entries, dict), f"the {table[1:]} of {what} are no dictionary")
            for name, entry in entries.items():
                shown = printable(repr(name))[:80]
                _require(
                    is_name(name), f"it calls a part of {what} {shown}, which is no name (letters, digits, _ and -)"
                )
                is_own = isinstance(_static(module, name), _METHODS)
                _require(not is_own, f"it puts {name} in place of the code of {what}")
                _require(entry is None or isinstance(entry, kind), f"{name} of {what} is no {kind.__name__}")

    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()
    }
    dispatch |= {
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: create,
        pickle.BUILD[0]: fill,
        pickle.SETITEM[0]: put_item,
        pickle.SETITEMS[0]: put_items,
        pickle.APPEND[0]: append_item,
        pickle.APPENDS[0]: append_items,
    }


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ForbiddenError(otherwise)


def _kind(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))


def _static(value: Any, name: str) -> Any:
    return inspect.getattr_static(type(value), name, None)


def _is_state_of(bound: Any, state: Any) -> bool:
    """Set the state of a partial, if it is one for the function that it was made with."""
    if not (isinstance(state, tuple) and len(state) == 4):
        return False
    function, arguments, keywords, attributes = state
    usual = type(arguments) is tuple and type(keywords) is dict and not attributes
    if not usual or function is not bound.func or not all(isinstance(name, str) for name in keywords):
        return False
    bound.__setstate__((function, arguments, keywords, None))
    return True


def _tensor(
    storage: Any, offset: int, size: Any, stride: Any, grad: bool = False, hooks: Any = None, dtype: Any = None
) -> Tensor:
    """A tensor of numbers that its storage has."""
    _require(not hooks, "it stores hooks on a tensor")
    sizes, strides = [int(n) for n in size], [int(n) for n in stride]
    _require(len(sizes) == len(strides) and min([offset, *sizes, *strides], default=0) >= 0, "a tensor has no shape")
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if 0 not in sizes else -1
    kind = dtype or storage.dtype
    untyped = storage._untyped_storage
    _require(last < untyped.nbytes() // kind.itemsize, f"a tensor of {'x'.join(map(str, sizes))} has too few numbers")
    made = torch.empty((0,), dtype=kind, device=untyped.device)
    made.set_(untyped, offset, tuple(sizes), tuple(strides))
    return made.requires_grad_(bool(grad))


def _tensor_v2(
    storage: Any, offset: int, size: Any, stride: Any, grad: bool, hooks: Any, metadata: Any = None
) -> Tensor:
    del metadata  # of views that are conjugated or negated, which no weight is
    return _tensor(storage, offset, size, stride, grad, hooks)


def _parameter(data: Any, grad: Any, hooks: Any, state: Any = None) -> nn.Parameter:
    _require(isinstance(data, Tensor) and not hooks, "a parameter is no tensor, or has hooks")
    parameter = nn.Parameter(data, bool(grad))
    _set_attributes(parameter, state)
    return parameter


def _with_attributes(make: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """A tensor with attributes of the user's."""
    maker = next((maker for known, maker in _CALLS[:3] if known is make), None)
    _require(maker is not None and kind is Tensor, "it makes a tensor of another type")
    assert maker is not None
    tensor: Tensor = maker(*arguments)
    _set_attributes(tensor, state)
    return tensor


def _set_attributes(tensor: Tensor, state: Any) -> None:
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    _require(not slots and isinstance(attributes, dict | None), "it changes a tensor")
    for name, value in (attributes or {}).items():
        own = not isinstance(name, str) or hasattr(Tensor, name)
        _require(not own and type(value) in _PLAIN_VALUES, f"it puts {printable(repr(name))} on a tensor")
        setattr(tensor, name, value)


def _meta(dtype: Any, size: Any, stride: Any, grad: Any) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta", requires_grad=bool(grad))


def _range(*bounds: int) -> range:
    made = range(*bounds)
    _require(len(made) <= LONGEST_RANGE, f"a range has {len(made)} numbers, more than {LONGEST_RANGE}")
    return made


def _of_container(kind: Callable[..., Any], kinds: tuple[type, ...] = _CONTAINERS) -> Make:
    """``kind`` of nothing, or of the content of one container that the file holds: never of a number or a range."""

    def make(*content: Any) -> Any:
        _require(
            len(content) < 2 and all(type(one) in kinds for one in content), f"it makes a {_kind(kind)} of another type"
        )
        return kind(*content)

    return make


def _encode(text: str, encoding: str) -> bytes:
    _require(encoding == "latin1", "it uses an encoding that bytes do not have")
    return text.encode(encoding)


def _defaultdict(factory: Any = None) -> "defaultdict[Any, Any]":
    _require(factory is None or isinstance(factory, type), "a dictionary makes its values by a call")
    return defaultdict(factory)


_utils = torch._utils
_CALLS: tuple[tuple[Any, Make], ...] = (
    (_utils._rebuild_tensor_v2, _tensor_v2),
    (_utils._rebuild_tensor_v3, lambda *args: _tensor(*args[:7])),
    (_utils._rebuild_tensor, _tensor),
    (_utils._rebuild_parameter, _parameter),
    (_utils._rebuild_parameter_with_state, _parameter),
    (_utils._rebuild_meta_tensor_no_storage, _meta),
    (torch._tensor._rebuild_from_type_v2, _with_attributes),
    (OrderedDict, _of_container(OrderedDict)),
    (Counter, _of_container(Counter, (dict,))),
    (defaultdict, _defaultdict),
    (set, _of_container(set)),
    (frozenset, _of_container(frozenset)),
    (bytearray, _of_container(bytearray, (bytes,))),
    (range, _range),
    (slice, slice),
    (codecs.encode, _encode),
    (complex, complex),
    (torch.Size, _of_container(torch.Size, (list, tuple))),
    (torch.device, torch.device),
    (torch.serialization._get_layout, torch.serialization._get_layout),
)
"""Function -> what is called in its place."""

_BASE: dict[str, Any] = {
    **{f"torch._utils.{function.__name__}": function for function, _ in _CALLS[:6]},
    "torch._tensor._rebuild_from_type_v2": torch._tensor._rebuild_from_type_v2,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "torch.Tensor": Tensor,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "_codecs.encode": codecs.encode,
    "builtins.set": set,
    "builtins.bytearray": bytearray,
    "builtins.complex": complex,
}
"""What files of tensors ask for, whatever they are for."""
