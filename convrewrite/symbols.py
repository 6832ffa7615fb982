"""Symbols for what a pickle builds, and what a call on them may cost: the rules behind :mod:`convrewrite.pickle_scan`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

Resolve = Callable[[str], object]
StorageSize = Callable[[str, int], None]
"""Raises HarmfulFile unless the storage of a key has so many bytes."""

LONGEST_RANGE = 1_000_000
MOST_ENTRIES = 10_000_000
"""Of all ranges, sets and texts that a file makes by calls; and ways that lead through its containers and modules."""
DEEPEST = 400
"""Containers within each other, four for a module in a module."""
SPARE_ELEMENTS = 1 << 24
MOST_LAYERS = 10_000
"""Of a recurrent layer, which PyTorch counts through when it is read."""
LARGEST_KEY = 1 << 60
"""Whole numbers beyond it can be chosen so that a dictionary of them takes quadratic time."""


class HarmfulFile(ValueError):
    """Reading the file would take time or memory out of proportion; the message says what, how much, and the limit."""


@dataclass(slots=True, eq=False)
class Node:
    """Something a pickle makes: "global", "tuple", "list", "dict", "set", "storage" (``numel`` elements) or "object"."""

    kind: str
    name: str = ""
    numel: int = 0
    children: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Bounds:
    """What is left to a file: ``elements`` of its tensors all together, and entries made by calls."""

    elements: int
    entries: int = MOST_ENTRIES

    def __post_init__(self) -> None:
        self.elements = 4 * self.elements + SPARE_ELEMENTS

    def spend_entries(self, count: int, what: str) -> None:
        """Raise HarmfulFile once all calls together have made too many entries."""
        self.entries -= count
        if self.entries < 0:
            raise HarmfulFile(f"it makes {what} of {count} entries, more than {MOST_ENTRIES} in all")

    def spend_elements(self, size: tuple[int, ...]) -> None:
        """Raise HarmfulFile once all tensors together have many more elements than the file has bytes."""
        self.elements -= math.prod(size)
        if self.elements < 0:
            raise HarmfulFile(
                f"with a tensor of shape {'x'.join(map(str, size))} its tensors have more elements than four for each "
                f"byte of the file and {SPARE_ELEMENTS}"
            )

    def check_shape(self, root: Any) -> None:
        """Raise HarmfulFile for what is nested too deeply, or reached on too many ways."""
        ways: dict[int, int] = {}
        depths: dict[int, int] = {}
        todo: list[tuple[Node, bool]] = [(root, False)] if isinstance(root, Node) else []
        entered: set[int] = set()
        while todo:
            node, done = todo.pop()
            children = [child for child in node.children if isinstance(child, Node)]
            if done:
                ways[id(node)] = 1 + sum(ways.get(id(child), 1) for child in children)
                depths[id(node)] = 1 + max((depths.get(id(child), 0) for child in children), default=0)
                if ways[id(node)] > MOST_ENTRIES:
                    raise HarmfulFile(f"more than {MOST_ENTRIES} ways lead through its containers and modules")
                if depths[id(node)] > DEEPEST:
                    raise HarmfulFile(f"its containers and modules are nested more than {DEEPEST} deep")
            elif id(node) not in entered:
                entered.add(id(node))
                todo.append((node, True))
                todo += [(child, False) for child in children if id(child) not in entered]


class Calls:
    """What every call in a file may be given. ``resolve`` tells what a name stands for, ``stored`` checks storages."""

    def __init__(self, resolve: Resolve, stored: StorageSize, bounds: Bounds) -> None:
        self._resolve = resolve
        self._stored = stored
        self.bounds = bounds

    def call(self, function: Any, arguments: Any) -> Node:
        """The result of calling ``function``; raises HarmfulFile for a call that may not be made."""
        name, given = _name_of(function), _items_of(arguments)
        if name in _REBUILDS:
            return self._rebuilt(name, given)
        if name in _CHECKS:
            return _CHECKS[name](self, name, given)
        known = self._resolve(name)
        if known is not None and (not isinstance(known, type) or issubclass(known, nn.Module)):
            raise HarmfulFile(f"it calls {name} while it is read, where files of torch.save only name it")
        if isinstance(known, type) and issubclass(known, Enum) and len(given) != 1:
            raise HarmfulFile(f"it calls {name} with {len(given)} values, an enumeration takes one")
        return Node("object", name, children=[arguments])

    def make(self, kind: Any, arguments: Any) -> Node:
        """An empty instance; a layer takes nothing, as its content follows."""
        name, given = _name_of(kind), _items_of(arguments)
        known = self._resolve(name)
        if given and (
            name in _TENSORS or name in _CHECKS or (isinstance(known, type) and issubclass(known, nn.Module))
        ):
            raise HarmfulFile(f"it makes {name} with {len(given)} values, where files of torch.save give none")
        if name == "collections.OrderedDict":
            return Node("dict", name)
        return Node("object", name, children=[arguments])

    def build(self, made: Any, state: Any) -> None:
        """Give an instance its state."""
        if not isinstance(made, Node) or made.kind not in ("object", "dict"):
            raise HarmfulFile("it gives a state to something that has none")
        if made.name in _TENSORS:
            raise HarmfulFile(f"it gives a state to {made.name}, in a form older than PyTorch 0.4; save it again")
        made.children.append(state)

    def storage(self, reference: Any) -> Node:
        """The storage of a persistent id, ``("storage", type, key, location, numel)``, in the old format with a view."""
        parts = _items_of(reference)
        if parts and parts[0] == "module":
            raise ValueError("a whole module in the old format, which PyTorch reads with its source code alone")
        if len(parts) not in (5, 6) or parts[0] != "storage" or not isinstance(parts[2], str):
            raise HarmfulFile("it refers to something that is no storage")
        numel = parts[4]
        if not _is_count(numel):
            raise HarmfulFile("it refers to a storage without a size")
        itemsize = _itemsize(_name_of(parts[1]))
        self._stored(parts[2], numel * itemsize)
        if len(parts) == 5 or parts[5] is None:
            return Node("storage", numel=numel)
        _, offset, length = _items_of(parts[5])
        if not _is_count(offset) or not _is_count(length) or offset + length > numel:
            raise HarmfulFile(f"it refers to a part of a storage that ends behind its {numel} elements")
        return Node("storage", numel=length)

    def check_items(self, items: list[Any]) -> None:
        """Keys and values of a dictionary."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            if key == "num_layers" and isinstance(value, int) and value > MOST_LAYERS:
                raise HarmfulFile(f"num_layers is {value}, the limit is {MOST_LAYERS}")

    def _rebuilt(self, name: str, given: list[Any]) -> Node:
        """A tensor, within its storage."""
        if name == "torch._tensor._rebuild_from_type_v2":
            function, _, arguments, *_ = given
            if _name_of(function) not in _REBUILDS:
                raise HarmfulFile(f"it builds a tensor by calling {_name_of(function)}")
            return self.call(function, arguments)
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return Node("object", "torch parameter", children=given)
        if name == "torch._utils._rebuild_meta_tensor_no_storage":
            _sizes(given[1]), _sizes(given[2])
            return Node("object", "torch tensor")
        storage, offset, size, stride = given[0], given[1], _sizes(given[2]), _sizes(given[3])
        if (
            not isinstance(storage, Node)
            or storage.kind != "storage"
            or not _is_count(offset)
            or len(size) != len(stride)
        ):
            raise HarmfulFile("it builds a tensor of something that is no storage")
        last = 0 if 0 in size else offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last > storage.numel:
            raise HarmfulFile(
                f"a tensor of shape {'x'.join(map(str, size))} ends at element {last} of a storage of {storage.numel}"
            )
        self.bounds.spend_elements(size)
        return Node("object", "torch tensor")

    def range(self, name: str, given: list[Any]) -> Node:
        """A range of bounded length."""
        if not 1 <= len(given) <= 3 or not all(isinstance(part, int) for part in given) or 0 in given[2:]:
            raise HarmfulFile(f"it calls {name} with something that is no number")
        first, last, step = (given[0], given[1], [*given, 1][2]) if len(given) > 1 else (0, given[0], 1)
        length = max(0, -((first - last) // step))
        if length > LONGEST_RANGE:
            raise HarmfulFile(f"it makes a range of {length} numbers, the limit is {LONGEST_RANGE}")
        self.bounds.spend_entries(length, "a range")
        return Node("object", name, numel=length)

    def gathered(self, name: str, given: list[Any]) -> Node:
        """A set, dictionary or size from a container that stands in the file."""
        if any(not isinstance(part, Node) or part.kind not in ("tuple", "list", "dict", "set") for part in given[-1:]):
            raise HarmfulFile(f"it calls {name} with something that is no container")
        for part in given:
            entries = part.children if isinstance(part, Node) else []
            self.bounds.spend_entries(len(entries), name)
            for entry in entries:
                _check_key(entry)
        return Node("dict" if name in _DICTS else "set", name, children=list(given))

    def dictionary(self, name: str, given: list[Any]) -> Node:
        """A defaultdict: its factory, and maybe what is in it."""
        if len(given) > 1:
            self.gathered(name, given[1:])
        return Node("dict", name, children=list(given))

    def encoded(self, name: str, given: list[Any]) -> Node:
        """Bytes that were stored as text."""
        if len(given) != 2 or not isinstance(given[0], str) or given[1] not in ("latin1", "latin-1"):
            raise HarmfulFile(f"it calls {name} with something that is no text in latin1")
        self.bounds.spend_entries(len(given[0]), "bytes")
        return Node("object", name)

    def bytes(self, name: str, given: list[Any]) -> Node:
        """A bytearray: of bytes that stand in the file, never of a number."""
        if any(not isinstance(part, str | Node) or (isinstance(part, Node) and part.numel) for part in given):
            raise HarmfulFile(f"it calls {name} with something that is neither text nor bytes")
        return Node("object", name)

    def small(self, name: str, given: list[Any]) -> Node:
        """A value whose cost does not depend on its arguments."""
        return Node("object", name, children=list(given))


def _check_key(key: Any) -> None:
    if isinstance(key, int) and abs(key) >= LARGEST_KEY:
        raise HarmfulFile(f"it has a key of {key.bit_length()} bits in a dictionary or a set, the limit is 60")


def _name_of(symbol: Any) -> str:
    if not isinstance(symbol, Node) or symbol.kind != "global":
        raise HarmfulFile("it calls something that is no function or class by name")
    return symbol.name


def _items_of(symbol: Any) -> list[Any]:
    if not isinstance(symbol, Node) or symbol.kind != "tuple":
        raise HarmfulFile("it makes a call without a tuple of arguments")
    return symbol.children


def _sizes(symbol: Any) -> tuple[int, ...]:
    if isinstance(symbol, Node) and symbol.name == "torch.Size":
        symbol = symbol.children[0]
    sizes = tuple(_items_of(symbol))
    if not all(map(_is_count, sizes)):
        raise HarmfulFile("it builds a tensor whose sizes and strides are no numbers of at least 0")
    return sizes


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _itemsize(name: str) -> int:
    """Bytes of one element of a storage type."""
    if name == "torch.storage.UntypedStorage":
        return 1
    home, _, kind = name.rpartition(".")
    if home not in ("torch", "torch.cuda") or not kind.endswith("Storage"):
        raise HarmfulFile(f"it refers to a storage of type {name[:60]!r}")
    try:
        dtype: torch.dtype = torch.serialization.StorageType(kind).dtype
    except (KeyError, AttributeError) as error:
        raise HarmfulFile(f"it refers to a storage of type {name[:60]!r}") from error
    return dtype.itemsize


_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter")
_DICTS = ("collections.OrderedDict", "collections.Counter")
_REBUILDS = {
    "torch._tensor._rebuild_from_type_v2",
    *(
        f"torch._utils.{name}"
        for name in (
            "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor", "_rebuild_parameter",
            "_rebuild_parameter_with_state", "_rebuild_meta_tensor_no_storage",
        )
    ),
}  # fmt: skip
_CHECKS: dict[str, Callable[[Calls, str, list[Any]], Node]] = {
    "builtins.range": Calls.range,
    "builtins.bytearray": Calls.bytes,
    "collections.defaultdict": Calls.dictionary,
    "_codecs.encode": Calls.encoded,
    **dict.fromkeys(
        ("builtins.set", "builtins.frozenset", "collections.OrderedDict", "collections.Counter", "torch.Size"),
        Calls.gathered,
    ),
    **dict.fromkeys(
        (
            "builtins.slice", "builtins.complex", "functools.partial", "torch.device", "torch.serialization._get_layout",
            "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        ),
        Calls.small,
    ),
}  # fmt: skip
