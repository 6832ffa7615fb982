"""Weights in a second file beside an ONNX file: bytes are copied from file to file, and never all in memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from convrewrite.errors import ModelLoadError
from convrewrite.onnx_files import tensors
from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.walks import graphs_of

LARGEST_INLINE = 2**31 - 2**26
"""Most bytes of numbers that a file holds itself: protobuf's limit, less what is kept free for the graph."""

SMALLEST_OUTSIDE = 1024
"""Bytes from which a weight goes to the second file: smaller ones are shapes and axes, which every reader of the graph needs."""

CHUNK = 2**24
"""Bytes that are copied at a time: few calls, and little memory."""

ALIGNMENT = 64
"""Every weight begins at a multiple of so many bytes: a line of a processor's cache, so that vectors load whole."""

PAGE = 4096
"""Large weights begin at multiples of so many bytes, as pages of memory do, so that they can be mapped."""

LARGE = 2**20
"""Bytes from which a weight is large: then what alignment to pages wastes does not matter."""

STALE = ("location", "offset", "length", "checksum", "basepath")
"""Entries that say where a tensor's bytes are, or that describe the whole file around them."""


def needs_second_file(model: onnx.ModelProto) -> bool:
    """Whether some weights lie outside already, or all together are more than a file holds."""
    if any(_is_outside(tensor) for tensor in tensors(model)):
        return True
    return _inline_bytes(model) > LARGEST_INLINE


def locations(model: onnx.ModelProto) -> set[str]:
    """The names of the other files in which weights lie."""
    outside = [tensor for tensor in tensors(model) if _is_outside(tensor)]
    return {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}


def move_out(model: onnx.ModelProto, original: OnnxFile, fresh: set[str], target: Path) -> None:
    """Write the second file, ``target``, and make the tensors of ``model`` name it.

    It gets what lies outside already, the initialisers called ``fresh``, and all others too where the file would be too large.
    Raises ModelLoadError where the original's files do not hold what they should, OSError where nothing can be written.
    """
    everything = _inline_bytes(model) > LARGEST_INLINE
    with target.open("xb") as file:
        writer = _Writer(file, original, target.name)
        for tensor in tensors(model):
            if _is_outside(tensor):
                writer.copy(tensor)
        for tensor in [tensor for graph in graphs_of(model) for tensor in graph.initializer]:
            movable = not _is_outside(tensor) and tensor.data_type != onnx.TensorProto.STRING
            if movable and (everything or tensor.name in fresh) and _inline_size(tensor) >= SMALLEST_OUTSIDE:
                writer.move(tensor)


class _Writer:
    """The second file in the making. Ranges of bytes that several tensors share are copied once."""

    def __init__(self, file: BinaryIO, original: OnnxFile, name: str) -> None:
        self._file, self._original, self._name = file, original, name
        self._copied: dict[tuple[str, int, int], int] = {}

    def copy(self, tensor: onnx.TensorProto) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        with _understood(tensor, self._original.source):
            location, start = entries["location"], int(entries.get("offset") or 0)
            length = int(entries.get("length") or _bytes_of(tensor))
            if min(start, length) < 0:
                raise ValueError("a negative place")
        place = self._copied.get((location, start, length))
        if place is None:
            place = self._begin(length)
            self._copied[location, start, length] = place
            for chunk in self._read(tensor, self._original.folder / location, start, length):
                self._file.write(chunk)
        self._point(tensor, place, length)

    def move(self, tensor: onnx.TensorProto) -> None:
        raw = tensor.raw_data if tensor.HasField("raw_data") else ir.serde.TensorProtoTensor(tensor).tobytes()
        place = self._begin(len(raw))
        self._file.write(raw)
        for name in [field.name for field, _ in tensor.ListFields() if field.name.endswith("_data")]:
            tensor.ClearField(name)
        self._point(tensor, place, len(raw))

    def _begin(self, length: int) -> int:
        """Fill up with zeros to where the next weight goes."""
        step = PAGE if length >= LARGE else ALIGNMENT
        self._file.write(bytes(-self._file.tell() % step))
        return self._file.tell()

    def _point(self, tensor: onnx.TensorProto, place: int, length: int) -> None:
        others = [(entry.key, entry.value) for entry in tensor.external_data if entry.key not in STALE]
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        here = [("location", self._name), ("offset", str(place)), ("length", str(length))]
        for key, value in (*here, *others):
            tensor.external_data.add(key=key, value=value)

    def _read(self, tensor: onnx.TensorProto, path: Path, start: int, length: int) -> Iterator[bytes]:
        where = f"{self._original.source}: weights of {tensor.name}: expected {length} bytes from {start} on in {path}"
        try:
            if not path.is_file():
                raise FileNotFoundError("it is no file")
            with path.open("rb") as file:
                file.seek(start)
                while length > 0:
                    chunk = file.read(min(length, CHUNK))
                    if not chunk:
                        raise ModelLoadError(f"{where}, found {length} bytes too few; put the whole file there")
                    length -= len(chunk)
                    yield chunk
        except (OSError, ValueError) as error:  # a null byte in a name
            raise ModelLoadError(f"{where}, found that it cannot be read ({error}); put that file there") from error


@contextmanager
def _understood(tensor: onnx.TensorProto, source: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError) as error:
        raise ModelLoadError(
            f"{source}: weights of {tensor.name}: expected where they lie, as location, offset and length, found "
            f"{[(entry.key, entry.value) for entry in tensor.external_data]}; export the model again"
        ) from error


def _is_outside(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's numbers, those of less than one byte packed. Raises ValueError for a type without a fixed size."""
    try:
        return math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)
    except TypeError as error:
        raise ValueError(f"a tensor of type {tensor.data_type}") from error


def _inline_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all numbers that stand in the model itself."""
    return sum(_inline_size(tensor) for tensor in tensors(model) if not _is_outside(tensor))


def _inline_size(tensor: onnx.TensorProto) -> int:
    return len(tensor.raw_data) if tensor.HasField("raw_data") else int(tensor.ByteSize())
