"""NumPy files, whose headers are read and checked before anything is allocated.

A header of a hundred bytes can claim any shape, and a zip member of a megabyte can unpack to a gigabyte. Therefore an
``.npz`` is unpacked no further than its wanted rows need, and there is a limit to what may be unpacked for them.
"""

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from convrewrite.errors import CalibrationError
from convrewrite.values import shape_text

NUMBERS = "fuib"
"""The kinds of dtype that hold numbers: floating, unsigned, signed, boolean."""

MOST_MEMBERS = 10_000
"""Most arrays in an ``.npz``."""

LONGEST_HEADER = 10_000
"""Most bytes of a header, numpy's own limit; that of an array of numbers has some hundred."""

_CHUNK = 1 << 22
"""Most bytes that are read at a time where rows are passed over."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array of an ``.npz``, known by its header alone; ``memory`` bounds in bytes what may be unpacked for its rows."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    columns_first: bool
    memory: int

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __getitem__(self, rows: Sequence[int]) -> NDArray[Any]:
        """These rows, given in ascending order. Raises CalibrationError where too much would have to be unpacked for them."""
        whole = self.shape[0] if self.columns_first else (max(rows, default=-1) + 1)
        require_room(f"{self.path}: {self.member}", whole * self.row_bytes, self.memory)
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            if self.columns_first:
                array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
                return array[list(rows)]
            _header(file)
            found = np.empty((len(rows), *self.shape[1:]), self.dtype)
            if not found.size:  # there is nothing to read, and numpy cannot reshape nothing to rows
                return found
            flat = found.reshape(len(rows), -1).view(np.uint8).reshape(len(rows), self.row_bytes)
            at = 0
            for target, row in zip(flat, rows, strict=True):
                _skip(file, (row - at) * self.row_bytes)
                target[:] = np.frombuffer(_exactly(file, self.row_bytes), np.uint8)
                at = row + 1
            return found


class Archive(Mapping[str, StoredArray]):
    """The arrays of an ``.npz`` by name; of each only the header is read. Raises what zipfile raises for a broken one."""

    def __init__(self, path: Path, memory: int) -> None:
        self._path, self._memory = path, memory
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if len(names) > MOST_MEMBERS:
            raise CalibrationError(f"{path}: expected at most {MOST_MEMBERS} arrays, found {len(names)}")
        self._members = {name.removesuffix(".npy"): name for name in names}

    def __getitem__(self, name: str) -> StoredArray:
        """The array; raises CalibrationError where its header does not fit what is stored."""
        member = self._members[name]
        with zipfile.ZipFile(self._path) as archive, archive.open(member) as file:
            shape, columns_first, dtype = _header(file)
            where, stored = f"{self._path}: {member}", archive.getinfo(member).file_size - file.tell()
        require_numbers(where, dtype)
        if math.prod(shape) * dtype.itemsize != stored:
            raise CalibrationError(
                f"{where}: expected {shape_text(shape)} numbers of {dtype}, {math.prod(shape) * dtype.itemsize} bytes, as its "
                f"header says, found {stored}; save it again"
            )
        return StoredArray(self._path, member, shape, dtype, columns_first and len(shape) > 1, self._memory)

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the file."""
        return iter(self._members)

    def __len__(self) -> int:
        """How many arrays there are."""
        return len(self._members)


def map_array(path: Path) -> NDArray[Any]:
    """An ``.npy`` mapped into memory: rows are read when they are used. Raises CalibrationError, ValueError, OSError."""
    with path.open("rb") as file:
        shape, _, dtype = _header(file)
        stored = path.stat().st_size - file.tell()
    require_numbers(str(path), dtype)
    if math.prod(shape) * dtype.itemsize > stored:
        raise CalibrationError(
            f"{path}: it cannot be read: expected {shape_text(shape)} numbers of {dtype}, "
            f"{math.prod(shape) * dtype.itemsize} bytes, as its header says, found {stored}; save it again"
        )
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(path, mode="r")


def require_room(where: str, wanted: int, memory: int) -> None:
    """Raise CalibrationError for inputs that do not fit into ``memory`` bytes."""
    if wanted > memory:
        raise CalibrationError(
            f"{where}: the inputs would take {wanted} bytes, the limit is {memory}; "
            "give fewer or smaller ones, save them as .npy, which is read only where it is needed, or raise --memory "
            "where the command has it"
        )


def require_numbers(where: str, dtype: np.dtype[Any]) -> None:
    """Raise CalibrationError for an array of objects, text, dates or records."""
    if dtype.kind not in NUMBERS:
        raise CalibrationError(f"{where}: expected numbers, floating-point or uint8, found an array of {dtype}")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype. Version 3 is for names of fields, which no array of numbers has."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): (2, np.lib.format.read_array_header_1_0), (2, 0): (4, np.lib.format.read_array_header_2_0)}
    if version not in readers:
        raise ValueError(f"a NumPy file of version {version}, which numbers do not need")
    width, read = readers[version]
    size = _exactly(file, width)
    length = int.from_bytes(size, "little")
    if length > LONGEST_HEADER:  # numpy would read all of it, four gigabytes, before it says so
        raise ValueError(f"a header of {length} bytes, the limit is {LONGEST_HEADER}")
    shape, columns_first, dtype = read(BytesIO(size + _exactly(file, length)))
    if any(size < 0 for size in shape):
        raise ValueError(f"a shape of negative sizes, {shape_text(shape)}")
    return shape, columns_first, dtype


def _skip(file: IO[bytes], count: int) -> None:
    while count > 0:
        count -= len(_exactly(file, min(count, _CHUNK)))


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes are missing at its end")
    return data
