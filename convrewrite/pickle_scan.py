"""What a file of ``torch.save`` would build, worked out before anything is built.

PyTorch's ``weights_only`` unpickler restricts *which* functions a file calls, not with what: a file of a kilobyte can ask for
a range of 10**9 numbers, a tensor of 10**12 elements over a storage of one, or modules that hold each other on 2**60
ways. Here the pickle is walked symbolically: every call is known by its name and its arguments, layers are only ever
made empty, sizes are bounded, and unpacked members of the archive may take no more bytes than the file has.
"""

import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from convrewrite.symbols import Bounds, Calls, HarmfulFile, Node, Resolve

LONGEST_PICKLE = 256 << 20
"""Bytes of the pickle itself, without the tensors."""
MOST_STEPS = 5_000_000
"""Opcodes; a network of a thousand layers takes some 300,000."""
MOST_MEMBERS = 200_000
"""Of an archive: one for each storage, and a few more."""

_PICKLES_OF_LEGACY = 5
"""Magic number, protocol, system, content, keys of the storages that follow."""


def require_harmless(path: Path, resolve: Resolve = lambda _: None) -> None:
    """Raise HarmfulFile unless reading the file takes time and memory in proportion to its size.

    ``resolve`` gives what the file would get for a name, None for one that is refused anyway. A file that is neither an
    archive nor in the old format is left to the reader. Raises OSError, ValueError and RuntimeError for a damaged file.
    """
    with path.open("rb") as file:
        start = file.read(2)
        if start == b"PK":
            _scan_archive(path, file, resolve)
        elif start == b"\x80\x02":
            file.seek(0)
            _scan_legacy(path, file, resolve)


def _scan_archive(path: Path, file: IO[bytes], resolve: Resolve) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if unpacked > size:
        raise HarmfulFile(f"its members unpack to {unpacked} bytes, the file has {size}; torch.save does not compress")
    if len(members) > MOST_MEMBERS or len({member.filename for member in members}) < len(members):
        raise HarmfulFile(f"expected at most {MOST_MEMBERS} members, each once, found {len(members)}")
    # What another reader of zip archives sees may differ, so from here on it is PyTorch's own.
    reader = torch._C.PyTorchFileReader(str(path))
    records = set(reader.get_all_records())
    sizes = {name: reader.get_record_size(name) for name in records}
    if sum(sizes.values()) > size:
        raise HarmfulFile(f"its members unpack to {sum(sizes.values())} bytes, the file has {size}")
    if "data.pkl" not in sizes or sizes["data.pkl"] > LONGEST_PICKLE:
        raise HarmfulFile(f"expected a pickle of at most {LONGEST_PICKLE} bytes, found {sizes.get('data.pkl', 'none')}")

    def stored(key: str, wanted: int) -> None:
        found = sizes.get(f"data/{key}")
        if found is None:
            raise ValueError(f"storage {key[:40]!r} is missing")
        if found != wanted:
            raise HarmfulFile(f"storage {key[:40]!r} should have {wanted} bytes, found {found}")

    bounds = Bounds(elements=size)
    _Walk(Calls(resolve, stored, bounds)).run(pickletools.genops(reader.get_record("data.pkl")))


def _scan_legacy(path: Path, file: IO[bytes], resolve: Resolve) -> None:
    size = path.stat().st_size
    total: dict[str, int] = {}

    def stored(key: str, wanted: int) -> None:
        total[key] = max(total.get(key, 0), wanted)
        if sum(total.values()) > size:
            raise HarmfulFile(f"its storages take more than {size} bytes, all that the file has")

    bounds = Bounds(elements=size)
    for _ in range(_PICKLES_OF_LEGACY):
        _Walk(Calls(resolve, stored, bounds)).run(pickletools.genops(file))


class _Walk:
    """The machine of a pickle, with symbols on its stack. It knows what PyTorch's own unpickler knows, and no more."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, steps: Iterator[tuple[Any, Any, int | None]]) -> None:
        """Walk to the end. Raises HarmfulFile, and ValueError where the file is none."""
        try:
            for number, (opcode, argument, _) in enumerate(steps):
                if number >= MOST_STEPS:
                    raise HarmfulFile(f"its pickle has more than {MOST_STEPS} steps")
                if opcode.name == "STOP":
                    self._calls.bounds.check_shape(self._stack[-1])
                    return
                self._step(opcode.name, argument)
        except (IndexError, KeyError, AttributeError, TypeError, AssertionError) as error:
            raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(Node(_EMPTY[name]))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name == "GLOBAL":
            stack.append(Node("global", name=_present_name(argument)))
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._stack = [*stack[: len(stack) - count], Node("tuple", children=stack[len(stack) - count :])]
        elif name != "PROTO":
            _ACTIONS[name](self) if name in _ACTIONS else _unknown(name)

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _tuple(self) -> None:
        items = self._pop_mark()
        self._stack.append(Node("tuple", children=items))

    def _append(self) -> None:
        self._fill([self._stack.pop()], ("list",))

    def _appends(self) -> None:
        self._fill(self._pop_mark(), ("list",))

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._fill([key, value], ("dict",))

    def _set_items(self) -> None:
        self._fill(self._pop_mark(), ("dict",))

    def _fill(self, items: list[Any], kinds: tuple[str, ...]) -> None:
        target = self._stack[-1]
        if not isinstance(target, Node) or target.kind not in kinds:
            raise HarmfulFile(f"it fills something that is no {kinds[0]}")
        if target.kind == "dict":
            self._calls.check_items(items)
        target.children.extend(items)

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._calls.call(function, arguments))

    def _new(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        self._stack.append(self._calls.make(kind, arguments))

    def _build(self) -> None:
        state, made = self._stack.pop(), self._stack[-1]
        self._calls.build(made, state)

    def _persistent(self) -> None:
        self._stack.append(self._calls.storage(self._stack.pop()))


def _present_name(argument: str) -> str:
    """``module name`` as it stands in a pickle -> its name in Python 3, as every unpickler translates it."""
    module, _, name = argument.partition(" ")
    if " " in name:
        raise HarmfulFile(f"it asks for {argument[:60]!r}, which is no name")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _unknown(name: str) -> None:
    raise HarmfulFile(f"its pickle has a step that no file of torch.save needs ({name})")


_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set", "EMPTY_TUPLE": "tuple"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: dict[str, Callable[[_Walk], None]] = {
    "TUPLE": _Walk._tuple, "APPEND": _Walk._append, "APPENDS": _Walk._appends, "SETITEM": _Walk._set_item,
    "SETITEMS": _Walk._set_items, "REDUCE": _Walk._reduce, "NEWOBJ": _Walk._new, "BUILD": _Walk._build,
    "BINPERSID": _Walk._persistent,
}  # fmt: skip

__all__ = ["HarmfulFile", "require_harmless"]
