"""Where calibration inputs come from: files, folders, tensors, loaders; each becomes raw tensors, not yet checked.

Nothing here runs code from a file: arrays are read without pickle, ``.pt`` files by an unpickler that makes tensors and plain
values. Only an object that the caller names (``FILE.py:NAME``) is imported, through the function passed for it.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from convrewrite.calibration.images import SUFFIXES, list_images, read_images
from convrewrite.errors import CalibrationError, ConvRewriteError
from convrewrite.escaping import TERMINAL_COLOUR, message_of
from convrewrite.process import quiet
from convrewrite.settings import MEMORY
from convrewrite.stored import Archive, StoredArray, map_array, read_pickle, require_numbers, require_room
from convrewrite.values import some_of

MOST_EXAMPLES = 100_000_000
"""Most examples that a source may hold: which of them to take is drawn by a permutation of all."""

LONGEST_REASON = 200
"""Most letters of what a reader says of a file, which may quote the whole of it."""

NAMED = 3
"""Most files that a note names."""

_INPUT_NAMES = ("image", "images", "input", "inputs", "x", "pixel_values")
LABEL_NAMES = frozenset({"label", "labels", "target", "targets", "y"})
_SUFFIXES = ".npy, .npz, .pt, .pth, a folder of images, or FILE.py:NAME"


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted of a source: how the model's inputs look, how many examples at most, and what to ask of images.

    ``names`` are those of the inputs as parameters of ``forward``, in its order; empty where they are not known.
    ``memory`` bounds the bytes of what is read.
    """

    example: tuple[Tensor, ...]
    limit: int
    seed: int
    resize: tuple[int, int] | None
    import_object: Callable[[str], object] | None
    names: tuple[str, ...] = ()
    memory: int = MEMORY


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some examples as they were found: one tensor for each model input, and the position of each example in the source."""

    tensors: tuple[Tensor, ...]
    positions: Sequence[int]


@dataclass(frozen=True, slots=True)
class Source:
    """A readable source. ``total`` is the number of examples, None where it is known only after reading to the end; ``notes`` say
    what was not taken; ``images``: it is a folder of them."""

    name: str
    chunks: Iterable[Chunk]
    total: int | None = None
    notes: tuple[str, ...] = ()
    images: bool = False


@runtime_checkable
class _MapDataset(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def open_source(source: object, request: Request) -> Source:
    """Find out what ``source`` is; raises CalibrationError when it is missing, unreadable or of no known kind."""
    try:
        return _open(source, request)
    except ConvRewriteError:
        raise
    except Exception as error:  # the caller's own code may raise anything
        name = source if isinstance(source, str | Path) else type(source).__name__
        raise CalibrationError(
            f"{name}: expected calibration inputs, but asking for them raised {type(error).__name__}: {message_of(error)}; "
            "correct it, or give the inputs as .npy, .npz or .pt"
        ) from error


def _open(source: object, request: Request) -> Source:
    if isinstance(source, type):  # has the methods of its instances
        source = source()
    match source:
        case str() | Path():
            return _read_path(source, request)
        case Tensor():
            return _read_arrays((source,), "a tensor", request)
        case np.ndarray():
            return _read_arrays((source,), "an array", request)
        case tuple():
            return _read_arrays(source, "a tuple of tensors", request)
        case Mapping():
            return _read_arrays(_pick(source, request, "a mapping", strict=True), "a mapping", request)
        case list():
            return _read_stream(source, "a list of batches", request)
        case IterableDataset():  # it has the __getitem__ of a Dataset, which refuses, and may have a length
            return _read_stream(source, type(source).__name__, request)
        case _MapDataset() if isinstance(source, Dataset) or not isinstance(source, Iterable):
            return _read_dataset(source, request)
        case Iterable():
            return _read_stream(source, type(source).__name__, request)
    if callable(source):
        made = source()
        if not callable(made) or isinstance(made, Iterable):
            return open_source(made, request)
    raise CalibrationError(
        "calibration source: expected a path, a tensor, an array or an iterable of batches, "
        f"found {type(source).__name__}"
    )


def _read_path(source: str | Path, request: Request) -> Source:
    path = Path(source)
    if not path.exists() and isinstance(source, str) and ":" in source:
        return _read_object(source, request)
    if not path.exists():
        raise CalibrationError(f"{path}: expected calibration inputs ({_SUFFIXES}), found no such file")
    if not path.is_dir() and not path.is_file():
        raise CalibrationError(f"{path}: expected calibration inputs ({_SUFFIXES}), found a pipe or a device")
    if path.is_dir():
        return _read_folder(path, request)
    suffix = path.suffix.lower()
    readers = {".npy": _read_npy, ".npz": _read_npz, ".pt": _read_pt, ".pth": _read_pt}
    if suffix not in readers:
        raise CalibrationError(f"{path}: expected {_SUFFIXES}, found a file of type {suffix or 'without a suffix'!r}")
    return readers[suffix](path, request)


def _read_object(target: str, request: Request) -> Source:
    if request.import_object is None:
        raise CalibrationError(f"{target}: expected a file, found none; objects cannot be named here: pass it itself")
    found = open_source(request.import_object(target), request)
    return replace(found, name=target)


def _read_npy(path: Path, request: Request) -> Source:
    with _reading(path, "a NumPy array"):
        return _read_arrays((map_array(path),), str(path), request)


def _read_npz(path: Path, request: Request) -> Source:
    with _reading(path, "a NumPy archive"):
        archive = Archive(path, request.memory)
        return _read_arrays(_pick(archive, request, str(path), strict=True), str(path), request)


def _read_pt(path: Path, request: Request) -> Source:
    with (
        _reading(path, "tensors alone, saved with torch.save"),
        quiet(),
    ):  # torch warns of what it will not read some day
        found = read_pickle(path)
    if not isinstance(found, (Tensor, tuple, list, Mapping)):
        kind = type(found).__name__
        raise CalibrationError(f"{path}: expected a tensor, or a tuple, list or dict of them, found {kind}")
    try:
        source = open_source(found, request)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
    return Source(str(path), source.chunks, source.total)


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """Turns what a truncated, foreign or pickled file raises into a CalibrationError that says what it should hold."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:  # a foreign file can make its reader fail in any way
        lines = TERMINAL_COLOUR.sub("", message_of(error)).strip().splitlines()  # a line may hold nothing but colours
        reason = lines[0][:LONGEST_REASON] if lines else type(error).__name__
        raise CalibrationError(f"{path}: expected {expected}, but it cannot be read: {reason}") from error


def _read_folder(folder: Path, request: Request) -> Source:
    paths, others = list_images(folder)
    if len(request.example) != 1:
        inputs = len(request.example)
        raise CalibrationError(f"{folder}: a folder gives one input, the model takes {inputs}; give an .npz")
    chosen = _choose(len(paths), request, str(folder))
    require_room(str(folder), len(chosen) * math.prod(request.example[0].shape[1:]), request.memory)
    images = read_images([paths[i] for i in chosen], request.example[0].shape[1:], request.resize)
    return Source(str(folder), [Chunk((images,), chosen)], len(paths), _skipped(others, folder), images=True)


def _skipped(others: Sequence[Path], folder: Path) -> tuple[str, ...]:
    if not others:
        return ()
    names = some_of([str(path.relative_to(folder)) for path in others], NAMED)
    count = "1 file" if len(others) == 1 else f"{len(others)} files"
    return (f"{count} skipped in {folder}, no images ({', '.join(sorted(SUFFIXES))}): {names}",)


def _read_dataset(dataset: _MapDataset, request: Request) -> Source:
    total = len(dataset)
    chosen = _choose(total, request, type(dataset).__name__)
    batches = (_positional(dataset[i], request) for i in chosen)
    chunks = (Chunk(tuple(t[None] for t in tensors), [i]) for tensors, i in zip(batches, chosen, strict=True))
    return Source(type(dataset).__name__, _guarded(chunks, type(dataset).__name__, request.memory), total)


def _read_stream(batches: Iterable[Any], name: str, request: Request) -> Source:
    return Source(name, _guarded(_stream(batches, request), name, request.memory))


def _stream(batches: Iterable[Any], request: Request) -> Iterator[Chunk]:
    """One chunk for every batch; an item without a batch axis is a batch of one."""
    count = 0
    for batch in batches:
        tensors = _listed(batch, request) or _positional(batch, request)
        if tensors[0].dim() == request.example[0].dim() - 1 and not _lacks_channels(tensors[0], request.example[0]):
            tensors = tuple(tensor[None] for tensor in tensors)
        size = len(tensors[0]) if tensors[0].dim() else 0
        yield Chunk(tensors, range(count, count + size))
        count += size


def _listed(batch: object, request: Request) -> tuple[Tensor, ...] | None:
    """The examples of a batch that has them one by one, as loaders for detectors give them: images beside their targets,
    ``((image, image), (target, target))``, a dictionary for each, ``[{"image": image}, {"image": image}]``, or a plain list of
    more than two, as two may be an image and its target. None for any other batch."""
    if not isinstance(batch, (tuple, list)) or not batch:
        return None
    if all(isinstance(one, Mapping) and one.keys() == batch[0].keys() for one in batch):
        rows = [_positional(one, request) for one in batch]
    elif len(request.example) == 1 and isinstance(batch[0], (tuple, list)) and batch[0]:
        rows = [(one,) for one in batch[0]]
    elif len(request.example) == 1 and isinstance(batch, list) and len(batch) > 2:
        rows = [(one,) for one in batch]
    else:
        return None
    shapes = [example.shape[1:] for example in request.example]
    if any([getattr(one, "shape", None) for one in row] != shapes for row in rows):
        return None
    return tuple(torch.stack(_tensors(column, len(rows), "a batch")) for column in zip(*rows, strict=True))


def _lacks_channels(tensor: Tensor, example: Tensor) -> bool:
    """Whether a tensor of one axis too few is a batch ``(N, H, W)`` of grey images, not one image ``(1, H, W)``."""
    return example.dim() == 4 and example.shape[1] == 1 and len(tensor) != 1 and tensor.shape[1:] == example.shape[2:]


def _guarded(chunks: Iterator[Chunk], name: str, memory: int) -> Iterator[Chunk]:
    """The same chunks, while they take no more than ``memory`` bytes; what the caller's loader raises becomes a CalibrationError
    that names it."""
    taken = 0
    for number in itertools.count():
        try:
            chunk = next(chunks)
        except StopIteration:
            return
        except CalibrationError:
            raise
        except Exception as error:  # the caller's own code may raise anything
            reason = f"{type(error).__name__}: {message_of(error)}"
            raise CalibrationError(f"{name}: batch {number}: reading it raised {reason}") from error
        taken += sum(tensor.numel() * tensor.element_size() for tensor in chunk.tensors)
        require_room(name, taken, memory)
        yield chunk


def _positional(batch: object, request: Request) -> tuple[Tensor, ...]:
    """The tensors of a batch that are model inputs: the first ones, or in a mapping those with the names of inputs."""
    count = len(request.example)
    if isinstance(batch, (Tensor, np.ndarray)):
        values: Sequence[Any] = (batch,)
    elif isinstance(batch, Mapping):
        values = _pick(batch, request, "a batch", strict=False)
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Mapping, tuple, list)):
        return _positional(batch[0], request)  # the inputs together, and labels beside them
    elif isinstance(batch, (tuple, list)):
        values = batch
    else:
        raise CalibrationError(
            f"a batch: expected a tensor, a tuple or a dict of tensors, found {type(batch).__name__}; "
            "convert it, for images with a ToTensor transform"
        )
    # A loader may fill the same tensors anew for its next batch.
    return tuple(tensor.clone() for tensor in _tensors(values, count, "a batch"))


def _pick(named: Mapping[str, Any], request: Request, where: str, *, strict: bool) -> list[Any]:
    """The values of ``named`` that are the model's inputs. ``strict`` refuses to guess among several."""
    count, names = len(request.example), [str(name) for name in named]
    wanted = request.names[:count]
    if len(wanted) == count and all(name in names for name in wanted):
        return [named[name] for name in wanted]
    if count == 1:
        known = [name for name in names if name.lower() in _INPUT_NAMES]
        if known:
            return [named[known[0]]]
    numbered = [f"input.{i}" for i in range(count)]
    if all(name in names for name in numbered):
        return [named[name] for name in numbered]
    rest = [name for name in names if name.lower() not in LABEL_NAMES]
    mixed = count > 1 and any(name in names for name in wanted)  # to take the others by their place would be a guess
    if mixed or len(rest) < count or (strict and len(rest) > count):
        several = f"{count} arrays, named {', '.join(wanted)} or " if wanted else f"{count} arrays, named "
        expected = f"{several}input.0 to input.{count - 1}" if count > 1 else "one array, or images"
        raise CalibrationError(f"{where}: expected {expected}, found {some_of(names, 6) or 'nothing'}")
    return [named[name] for name in rest[:count]]


def _read_arrays(values: Sequence[Any], name: str, request: Request) -> Source:
    """Whole inputs of known length, thinned at random to ``limit`` examples, as they may be sorted by class."""
    count = len(request.example)
    if len(values) < count:
        raise CalibrationError(f"{name}: expected {count} tensors, one for each model input, found {len(values)}")
    wanted = values[:count]
    sizes = {_length(value, name) for value in wanted}
    if len(sizes) != 1:
        raise CalibrationError(f"{name}: expected as many examples in every input, found {sorted(sizes)}")
    total = sizes.pop()
    chosen = _choose(total, request, name)
    require_room(name, sum(len(chosen) * _row_bytes(value) for value in wanted), request.memory)
    whole = len(chosen) == total
    thinned = [value if whole and not isinstance(value, StoredArray) else value[chosen] for value in wanted]
    return Source(name, [Chunk(_tensors(thinned, count, name), chosen)], total)


def _length(value: object, name: str) -> int:
    if not isinstance(value, (Tensor, np.ndarray, StoredArray)):
        raise CalibrationError(f"{name}: expected tensors or arrays, found {type(value).__name__}")
    return value.shape[0] if value.ndim else 0


def _row_bytes(value: Tensor | NDArray[Any] | StoredArray) -> int:
    itemsize = value.element_size() if isinstance(value, Tensor) else value.dtype.itemsize
    return math.prod(value.shape[1:]) * itemsize


def _choose(total: int, request: Request, name: str) -> list[int]:
    """The indices to use, in order: all, or ``limit`` of them drawn at random."""
    if total > MOST_EXAMPLES:
        raise CalibrationError(f"{name}: expected at most {MOST_EXAMPLES} examples, found {total}; give a part of them")
    if total <= request.limit:
        return list(range(total))
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(request.seed))[: request.limit]
    return sorted(drawn.tolist())


def _tensors(values: Sequence[Any], count: int, where: str) -> tuple[Tensor, ...]:
    if len(values) < count:
        raise CalibrationError(f"{where}: expected {count} tensors, one for each model input, found {len(values)}")
    return tuple(_tensor(value, where) for value in values[:count])


def _tensor(value: object, where: str) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            kind = (
                "meta" if value.is_meta else "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            )
            raise CalibrationError(
                f"{where}: expected dense tensors, whose numbers are all there, found a {kind} one; convert it"
            )
        return value.detach().cpu()
    if not isinstance(value, np.ndarray):
        raise CalibrationError(f"{where}: expected tensors or arrays, found {type(value).__name__}")
    require_numbers(where, value.dtype)
    # torch knows only the machine's own byte order and writable memory.
    native = value.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(value, dtype=np.float64 if native.itemsize > 8 else native))
