"""The few functions that files of tensors and plain values call, each with the arguments that saving gives it and no others."""

import codecs
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.escaping import printable
from convrewrite.stored.bounds import Bounds, ExcessiveError, ForbiddenError, require
from convrewrite.values import shape_text

LONGEST_RANGE = 1_000_000
"""Most numbers in a range."""

MOST_AXES = 64
"""Most axes of a tensor."""

_CONTAINERS = (list, tuple, dict, OrderedDict)
_PLAIN_VALUES = (int, float, str, bytes, bool, complex, type(None), torch.dtype, torch.Size)
Make = Callable[..., Any]


class Calls:
    """What is called in place of the functions of a file; what they make is charged to ``bounds``."""

    def __init__(self, bounds: Bounds) -> None:
        """The table of all that is called."""
        self._bounds = bounds
        self._rebuild: dict[int, Make] = {
            id(_utils._rebuild_tensor): self._tensor,
            id(_utils._rebuild_tensor_v2): self._tensor_v2,
            id(_utils._rebuild_tensor_v3): self._tensor_v3,
        }
        self._makers: dict[int, Make] = {
            **self._rebuild,
            **{id(function): maker for function, maker in _FREE.items()},
            id(_utils._rebuild_parameter): self._parameter,
            id(_utils._rebuild_parameter_with_state): self._parameter,
            id(torch._tensor._rebuild_from_type_v2): self._with_attributes,
            id(OrderedDict): self._ordered,
            id(Counter): lambda *content: Counter(*_content("Counter", content, (dict,))),
            id(set): lambda *content: set(self._keys("set", content)),
            id(frozenset): lambda *content: frozenset(self._keys("frozenset", content)),
        }

    def maker(self, function: Any) -> Make | None:
        """What is called for a function; None if files of tensors call no such thing."""
        return self._makers.get(id(function))

    def _tensor(
        self,
        storage: Any,
        offset: int,
        size: Any,
        stride: Any,
        grad: bool = False,
        hooks: Any = None,
        dtype: Any = None,
    ) -> Tensor:
        """A tensor whose elements all lie in its storage."""
        require(not hooks, "it stores hooks on a tensor")
        require(type(storage) is torch.storage.TypedStorage, "it builds a tensor of something that is no storage")
        require(dtype is None or isinstance(dtype, torch.dtype), "it builds a tensor of no type of numbers")
        sizes, strides = _sizes(size), _sizes(stride)
        require(is_count(offset) and len(sizes) == len(strides), "a tensor has no shape")
        kind = dtype or storage.dtype
        untyped = storage._untyped_storage
        numel = untyped.nbytes() // kind.itemsize
        last = 0 if 0 in sizes else offset + 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if last > numel:
            raise ExcessiveError(
                f"a tensor of shape {shape_text(sizes)} ends at element {last} of a storage of {numel}"
            )
        self._bounds.spend_elements(sizes)
        made = torch.empty((0,), dtype=kind, device=untyped.device)
        made.set_(untyped, offset, sizes, strides)
        return made.requires_grad_(bool(grad))

    def _tensor_v2(
        self, storage: Any, offset: int, size: Any, stride: Any, grad: bool, hooks: Any, metadata: Any = None
    ) -> Tensor:
        return _lazily_changed(self._tensor(storage, offset, size, stride, grad, hooks), metadata)

    def _tensor_v3(
        self, storage: Any, offset: int, size: Any, stride: Any, grad: bool, hooks: Any, dtype: Any, *metadata: Any
    ) -> Tensor:
        require(len(metadata) < 2, "it builds a tensor of more than it has")
        return _lazily_changed(self._tensor(storage, offset, size, stride, grad, hooks, dtype), *metadata)

    def _parameter(self, data: Any, grad: Any, hooks: Any, state: Any = None) -> nn.Parameter:
        require(isinstance(data, Tensor) and not hooks, "a parameter is no tensor, or has hooks")
        parameter = nn.Parameter(data, bool(grad))
        self._set_attributes(parameter, state)
        return parameter

    def _with_attributes(self, make: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
        """A tensor with attributes that a user has set."""
        maker = self._rebuild.get(id(make))
        require(
            maker is not None and kind is Tensor and isinstance(arguments, tuple), "it makes a tensor of another type"
        )
        assert maker is not None
        tensor: Tensor = maker(*arguments)
        self._set_attributes(tensor, state)
        return tensor

    def _set_attributes(self, tensor: Tensor, state: Any) -> None:
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        require(not slots and isinstance(attributes, dict | None), "it changes a tensor")
        self._bounds.spend_entries(attributes)
        for name, value in (attributes or {}).items():
            own = not isinstance(name, str) or hasattr(Tensor, name)
            if own or type(value) not in _PLAIN_VALUES:
                raise ForbiddenError(
                    f"it puts {printable(repr(name[:80] if isinstance(name, str) else name))} on a tensor"
                )
            setattr(tensor, name, value)

    def _ordered(self, *content: Any) -> "OrderedDict[Any, Any]":
        """Made from nothing, or from pairs, as in files from Python 2."""
        _content("OrderedDict", content, _CONTAINERS)
        pairs = content[0] if content and not isinstance(content[0], dict) else ()
        require(all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs), "a dictionary has no pairs")
        for key, _ in pairs:
            self._bounds.require_key(key)
        return OrderedDict(*content)

    def _keys(self, kind: str, content: tuple[Any, ...]) -> Iterable[Any]:
        entries: Iterable[Any] = next(iter(_content(kind, content, (*_CONTAINERS, set))), ())
        for entry in entries:
            self._bounds.require_key(entry)
        return entries


def _lazily_changed(tensor: Tensor, marks: Any = None) -> Tensor:
    """A tensor with the marks that torch keeps in place of computing a conjugate (``conj``) or a negative (``neg``)."""
    if not marks:
        return tensor
    usual = type(marks) is dict and set(marks) <= {"conj", "neg"} and all(type(mark) is bool for mark in marks.values())
    require(usual, "it marks a tensor in a way that torch does not")
    has_conjugate, has_negative = tensor.is_complex(), tensor.is_complex() or tensor.is_floating_point()
    require(has_conjugate or not marks.get("conj"), f"it marks numbers of {tensor.dtype} as conjugated")
    require(has_negative or not marks.get("neg"), f"it marks numbers of {tensor.dtype} as negated")
    torch._utils.set_tensor_metadata(tensor, marks)
    return tensor


def _content(kind: str, content: tuple[Any, ...], kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """Nothing, or the content of one container that the file holds: never of a number or a range."""
    require(len(content) < 2 and all(type(one) in kinds for one in content), f"it makes a {kind} of another type")
    return content


def _sizes(values: Any) -> tuple[int, ...]:
    require(isinstance(values, list | tuple) and len(values) <= MOST_AXES, f"a tensor has more than {MOST_AXES} axes")
    require(all(map(is_count, values)), "a tensor has no shape")
    return tuple(values)


def is_count(value: Any) -> bool:
    """Whether it is a whole number that can count something."""
    return type(value) is int and 0 <= value < 1 << 62


def _meta(dtype: Any, size: Any, stride: Any, grad: Any) -> Tensor:
    return torch.empty_strided(_sizes(size), _sizes(stride), dtype=dtype, device="meta", requires_grad=bool(grad))


def _range(*bounds: Any) -> range:
    require(all(type(bound) is int for bound in bounds), "it makes a range of something that is no number")
    made = range(*bounds)
    length = max(0, -((made.start - made.stop) // made.step))
    if length > LONGEST_RANGE:
        raise ExcessiveError(f"it makes a range of {length} numbers, the limit is {LONGEST_RANGE}")
    return made


def _slice(*bounds: Any) -> slice:
    require(
        all(type(bound) in (int, type(None)) for bound in bounds), "it makes a slice of something that is no number"
    )
    return slice(*bounds)


def _complex(*parts: Any) -> complex:
    require(all(type(part) in (int, float) for part in parts), "it makes a complex number of something that is none")
    return complex(*parts)


def _bytes(*content: Any) -> bytes:
    """Those of no length, which protocol 2 writes as a call; others come through :func:`_encode`."""
    require(not content, "it makes bytes of something")
    return b""


def _bytearray(*content: Any) -> bytearray:
    return bytearray(*_content("bytearray", content, (bytes,)))


def _size(*content: Any) -> torch.Size:
    numbers = _content("Size", content, (list, tuple))
    return torch.Size(*map(_sizes, numbers))


def _encode(text: Any, encoding: Any) -> bytes:
    require(type(text) is str and encoding == "latin1", "it uses an encoding that bytes do not have")
    return bytes(text, "latin1")


def _defaultdict(factory: Any = None) -> "defaultdict[Any, Any]":
    require(factory is None or isinstance(factory, type), "a dictionary makes its values by a call")
    return defaultdict(factory)


_utils = torch._utils
_get_layout = torch.serialization._get_layout
_FREE: dict[Any, Make] = {
    _utils._rebuild_meta_tensor_no_storage: _meta,
    range: _range,
    slice: _slice,
    complex: _complex,
    bytes: _bytes,
    bytearray: _bytearray,
    codecs.encode: _encode,
    defaultdict: _defaultdict,
    torch.Size: _size,
    torch.device: torch.device,
    _get_layout: _get_layout,
}

BASE: dict[str, Any] = {
    **{
        f"torch._utils.{function.__name__}": function
        for function in (
            _utils._rebuild_tensor,
            _utils._rebuild_tensor_v2,
            _utils._rebuild_tensor_v3,
            _utils._rebuild_parameter,
            _utils._rebuild_parameter_with_state,
            _utils._rebuild_meta_tensor_no_storage,
        )
    },
    "torch._tensor._rebuild_from_type_v2": torch._tensor._rebuild_from_type_v2,
    "torch.serialization._get_layout": _get_layout,
    "torch.Tensor": Tensor,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "collections.defaultdict": defaultdict,
    "_codecs.encode": codecs.encode,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytes": bytes,
    "builtins.bytearray": bytearray,
    "builtins.complex": complex,
    "builtins.range": range,
    "builtins.slice": slice,
}
"""Names that files of tensors and plain values ask for, whatever they are for -> what they get."""
