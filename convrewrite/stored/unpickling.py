"""An unpickler for model files: it makes what saving a model writes, in the way saving writes it, and nothing else.

A list of harmless classes is not enough: a pickle calls what is on the list with any arguments, and puts any attributes on what
it made. Here a module's class is never called: its instance is only filled with its state, as ``torch.save`` stores it. Only the
few functions that tensors and plain values need are called, each with the arguments that saving gives it. At the end everything
made is checked: no attribute may stand in place of a method, no hook may be stored, no name may be code. All of it is charged to
an account (:mod:`convrewrite.stored.bounds`), so that time and memory stay in proportion to the file.
"""

import _compat_pickle
import functools
import itertools
import pickle
import pickletools
import tarfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from enum import Enum
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import torch
from torch import Tensor, nn

from convrewrite.process import no_warnings
from convrewrite.stored.archives import is_script, pickle_of, stored_sizes
from convrewrite.stored.bounds import (
    MOST_STEPS,
    Bounds,
    ExcessiveError,
    ForbiddenError,
    ForbiddenNameError,
    InstancesOnly,
    require,
    require_shape,
)
from convrewrite.stored.calls import BASE, Calls, Make, is_count
from convrewrite.stored.states import LONGEST_NAME, StateRules, kind_of, require_few_layers

ZIP_MAGIC = b"PK\x03\x04"

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of files that ``torch.save`` wrote before PyTorch 1.6."""

USUAL_PROTOCOL = 2
"""The protocol of pickles whose steps are known here, which torch.save writes."""

_PICKLES_OF_LEGACY = 5
"""How many pickles such a file has: magic number, protocol, system, content, keys of the storages that follow."""

_DICTIONARIES = (dict, OrderedDict, defaultdict, Counter)

_OPCODES = (
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_DICT "
    "EMPTY_LIST EMPTY_TUPLE EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPERSID BINGET "
    "LONG_BINGET BINPUT LONG_BINPUT GLOBAL REDUCE NEWOBJ BUILD"
)
"""Opcodes that ``torch.save`` writes, in pickle's second protocol; everything else is refused."""

Resolve = Callable[[str], Any]
"""Function from a name that a file asks for to what it gets; None if it must not have it."""


def nothing(_: str) -> None:
    """Resolves no name: a file of tensors and plain values needs no more than it gets anyway."""


def read_pickle(path: Path, resolve: Resolve = nothing, vouched: Collection[Any] = ()) -> object:
    """The object that ``torch.save`` wrote, on the CPU, from an archive or in the old format.

    ``resolve`` gives what the file may have besides what files of tensors need; ``vouched`` are the classes and functions that
    may be called with any arguments (unless they are modules), and whose instances may be hooks. Raises ForbiddenError and
    ExcessiveError, and errors of any kind for a damaged file.
    """
    if _require_format(path):
        stored: dict[str, int] | None = stored_sizes(path)
        require(not is_script(path), "it is a TorchScript archive")
    else:
        stored = None
    reader: Any = ModelPickle(resolve, vouched, Bounds(path.stat().st_size, stored))
    with no_warnings():  # on old storages and sources: nothing the user could act upon
        loaded: object = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    return loaded


def names_asked(path: Path) -> list[str]:
    """Every class and function that a file names, by its name in Python 3, read without running anything."""
    names: set[str] = set()
    # If the rest is broken, the names before it are still worth reporting.
    with suppress(Exception), path.open("rb") as file:
        archived = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        file.seek(0)
        source = BytesIO(pickle_of(path)) if archived else file
        for _ in range(1 if archived else _PICKLES_OF_LEGACY):
            for opcode, argument, _ in itertools.islice(pickletools.genops(source), MOST_STEPS):
                if opcode.name == "GLOBAL":
                    names.add(_present_name(*str(argument).split(" ", 1)))
    return sorted(name for name in names if "Storage" not in name)


def is_base(name: str) -> bool:
    """Whether every file may name this, whatever it is for."""
    return _base(name) is not None


class ModelPickle:
    """Stands in for the module ``pickle`` where ``torch.load`` asks for one: its ``Unpickler`` is the one described above."""

    def __init__(self, resolve: Resolve, vouched: Collection[Any], bounds: Bounds) -> None:
        """As for :func:`read_pickle`; all pickles of one file have the same ``bounds``."""

        class Unpickler(_Unpickler):
            account = bounds
            resolved = staticmethod(functools.cache(resolve))
            trusted = tuple(vouched)

        self.Unpickler = Unpickler
        self.__name__ = __name__

    def load(self, file: IO[bytes], **options: Any) -> Any:
        """The next pickle of a file in the old format."""
        return self.Unpickler(file, **options).load()


class _Unpickler(pickle._Unpickler):  # the one in Python, whose steps can be replaced
    account: Bounds
    resolved: Resolve
    trusted: tuple[Any, ...]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        super().__init__(file, **options)
        self._file = file
        self._calls = Calls(self.account)
        self._state = StateRules(self.account, self.trusted)
        self._granted: dict[int, Any] = {}
        self._made: list[Any] = []
        self._unfilled: set[int] = set()

    def read(self, count: int) -> bytes:
        self.account.spend_bytes(count)
        return self._file.read(count)

    def readline(self) -> bytes:
        """Only names are read by lines."""
        return self._file.readline(LONGEST_NAME)

    def load(self) -> Any:
        loaded = self._run()
        require_shape([loaded, *self._made])
        for value in self._made:
            self._state.require_inert(value, getattr(value, "__dict__", {}))
        return loaded

    def _run(self) -> Any:
        """What the pickle leaves on the stack."""
        self.stack = []
        self.metastack: list[list[Any]] = []
        self.append = self.stack.append
        for _ in range(MOST_STEPS):
            key = self.read(1)
            if not key:
                raise EOFError("the pickle ends too early")
            if key == pickle.STOP:
                return self.stack.pop()
            step = self.dispatch.get(key[0])
            if step is None:
                raise ExcessiveError(
                    f"its pickle is damaged, or has a step ({key!r}) that torch.save does not write in protocol 2"
                )
            step(self)
        raise ExcessiveError(f"its pickle has more than {MOST_STEPS} steps")

    def find_class(self, module: str, name: str) -> Any:
        full = _present_name(module, name)
        granted = type(self).resolved(full)
        if granted is not None:
            for one in (granted, granted.kind) if isinstance(granted, InstancesOnly) else (granted,):
                self._granted[id(one)] = one
            return granted
        value = _base(full)
        if value is None:
            raise ForbiddenNameError(f"it asks for {full}")
        return value

    def open_protocol(self) -> None:
        """PROTO."""
        version = self.read(1)
        if version > bytes([USUAL_PROTOCOL]):
            raise ExcessiveError(
                f"its pickle is of protocol {version[0]}, where torch.save writes {USUAL_PROTOCOL} unless it is told another; "
                "save it again without pickle_protocol"
            )

    def refer(self) -> None:
        """BINPERSID: a storage, or in the old format a class with its source, which is ignored."""
        reference = self.stack.pop()
        usual = isinstance(reference, tuple) and len(reference) > 1
        if usual and reference[0] == "module":
            require(
                self._is_granted(reference[1]) and isinstance(reference[1], type | InstancesOnly),
                "it refers to a module of no class",
            )
            self.stack.append(reference[1])
            return
        require(
            usual and reference[0] == "storage" and len(reference) in (5, 6),
            "it refers to something that is no storage",
        )
        _, kind, key, _, numel, *view = reference
        require(
            kind is torch.UntypedStorage or type(kind) is torch.serialization.StorageType,
            "it refers to a storage of no type",
        )
        require(isinstance(key, str) and is_count(numel), "it refers to a storage without a size")
        itemsize = 1 if kind is torch.UntypedStorage else kind.dtype.itemsize
        self.account.require_storage(key, numel * itemsize)
        if view and view[0] is not None:
            _, first, count = view[0]
            if not is_count(first) or not is_count(count) or first + count > numel:
                raise ExcessiveError(f"it refers to a part of a storage that ends behind its {numel} elements")
        self.stack.append(self.persistent_load(reference))

    def call(self) -> None:
        """REDUCE."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        require(isinstance(arguments, tuple), "it calls something without arguments")
        self.account.spend_entries(arguments, *arguments)
        self.stack[-1] = self._keep(self._maker(function)(*arguments))

    def create(self) -> None:
        """NEWOBJ."""
        arguments = self.stack.pop()
        kind = self.stack.pop()
        kind = kind.kind if isinstance(kind, InstancesOnly) else kind
        if not (isinstance(kind, type) and self._is_granted(kind)):
            raise ForbiddenError(f"it makes a {kind_of(kind)}")
        is_tuple = issubclass(kind, tuple)
        if issubclass(kind, Enum) or not (isinstance(arguments, tuple) and (is_tuple or arguments == ())):
            raise ForbiddenError(f"it makes a {kind.__name__} in another way than saving does")
        self.account.spend_entries(arguments)
        self.stack.append(self._keep(kind.__new__(kind, *arguments)))

    def fill(self) -> None:
        """BUILD."""
        state = self.stack.pop()
        value = self.stack[-1]
        require(id(value) in self._unfilled, f"it changes a {kind_of(value)}")
        self._unfilled.remove(id(value))
        self.account.spend_entries(state, *(state if isinstance(state, tuple) else ()))
        if isinstance(value, functools.partial):
            require(_is_state_of(value, state), "it changes a function")
            return
        if isinstance(state, dict):
            self._state.require_inert(value, state)
            require_few_layers(value, state)
        if hasattr(type(value), "__setstate__"):
            value.__setstate__(state)
        else:
            require(isinstance(state, dict) and hasattr(value, "__dict__"), f"it changes a {kind_of(value)}")
            vars(value).update(state)

    def put_item(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key], [value])

    def put_items(self) -> None:
        """SETITEMS."""
        items = self.pop_mark()
        require(len(items) % 2 == 0, "it has a key without a value")
        self._put(items[::2], items[1::2])

    def _put(self, keys: list[Any], values: list[Any]) -> None:
        target = self._target(*_DICTIONARIES)
        for key, value in zip(keys, values, strict=True):
            self.account.require_key(key)
            target[key] = value

    def append_item(self) -> None:
        """APPEND."""
        value = self.stack.pop()
        self._target(list).append(value)

    def append_items(self) -> None:
        """APPENDS."""
        items = self.pop_mark()
        self._target(list).extend(items)

    def _target(self, *kinds: type) -> Any:
        require(type(self.stack[-1]) in kinds, f"it adds to a {kind_of(self.stack[-1])}")
        return self.stack[-1]

    def _is_granted(self, value: Any) -> bool:
        return id(value) in self._granted

    def _maker(self, function: Any) -> Make:
        """What is called for a function of the file: the function itself only if it may have any arguments."""
        maker = self._calls.maker(function)
        if maker is not None:
            return maker
        if self._is_granted(function):
            if function is functools.partial:
                return self._partial
            vouched = any(function is one for one in self.trusted)
            if vouched and not (isinstance(function, type) and issubclass(function, nn.Module)):
                made: Make = function
                return made
            if isinstance(function, type) and issubclass(function, Enum):
                return functools.partial(self._member, function)
            if isinstance(function, type) and issubclass(function, SimpleNamespace):
                return functools.partial(_namespace, function)
        raise ForbiddenError(f"it calls {kind_of(function)}")

    def _member(self, kind: Any, value: Any) -> Any:
        self.account.require_key(value)
        return kind(value)

    def _partial(self, function: Any, *more: Any) -> Any:
        allowed = isinstance(function, functools.partial) or self._is_granted(function)
        require(
            allowed and not isinstance(function, InstancesOnly) and not more,
            "it binds arguments to something else than a layer",
        )
        return functools.partial(function)

    def _keep(self, value: Any) -> Any:
        """Remember a value that may be filled with a state, and has to be checked at the end."""
        if isinstance(value, nn.Module | functools.partial | OrderedDict) or self._is_record(value):
            self._made.append(value)
            self._unfilled.add(id(value))
        return value

    def _is_record(self, value: Any) -> bool:
        return self._is_granted(type(value)) and not isinstance(value, Enum | Tensor)

    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()
    }
    dispatch |= {
        pickle.PROTO[0]: open_protocol,
        pickle.BINPERSID[0]: refer,
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: create,
        pickle.BUILD[0]: fill,
        pickle.SETITEM[0]: put_item,
        pickle.SETITEMS[0]: put_items,
        pickle.APPEND[0]: append_item,
        pickle.APPENDS[0]: append_items,
    }


def _require_format(path: Path) -> bool:
    """Whether a file is an archive. Raises ForbiddenError for other formats: torch.load has readers of its own for them."""
    with path.open("rb") as file:
        start = file.read(len(LEGACY_MAGIC))
        if start.startswith(ZIP_MAGIC):
            return True
        require(start == LEGACY_MAGIC, "it is neither a zip archive from its first byte on nor a file of torch.save")
        file.seek(0)
        with suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:"):
            raise ForbiddenError("it is a tar archive")
    return False


def _present_name(module: str, name: str) -> str:
    """A name as every unpickler translates it."""
    renamed = (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
    return ".".join(_compat_pickle.NAME_MAPPING.get((module, name), renamed))


def _base(full: str) -> Any:
    home, _, name = full.rpartition(".")
    value = getattr(torch, name, None) if home == "torch" else None
    return value if isinstance(value, torch.dtype | torch.qscheme) else BASE.get(full)


def _namespace(kind: Any, *content: Any) -> Any:
    """An empty namespace, made without calling the class; its attributes follow as a state."""
    require(not content, f"it makes a {kind_of(kind)} in another way than saving does")
    return kind.__new__(kind)


def _is_state_of(bound: Any, state: Any) -> bool:
    """Whether a state of a partial is for the function that the partial was made with; if so, it is set."""
    if not (isinstance(state, tuple) and len(state) == 4):
        return False
    function, arguments, keywords, attributes = state
    usual = type(arguments) is tuple and type(keywords) is dict and not attributes
    if not usual or function is not bound.func or not all(isinstance(name, str) for name in keywords):
        return False
    bound.__setstate__((function, arguments, keywords, None))
    return True
