"""Calibration inputs: real ones from wherever the user keeps them, checked against the model before any long work.

The factors of a rewrite are fitted on real inputs and measured on others, so every source is split once, by a seeded
permutation (a data set may be sorted by class). Labels are never needed and always ignored.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import Tensor

from convrewrite.calibration.reading import Reading, ReadingOptions
from convrewrite.calibration.sources import Chunk, Request, Source, open_source
from convrewrite.errors import CalibrationError, UsageError
from convrewrite.inputs import Inputs, moved
from convrewrite.stored import raw_bytes
from convrewrite.values import counted

FEW_INPUTS = 64
"""With fewer calibration inputs than this a note says that fits may be better on these than on others; not that they have fewer
samples than unknowns, as one image has thousands of positions. More of them add little to synthetic ones."""

LIMIT = 1024
"""Most examples, unless the caller says otherwise."""

LARGEST_BATCH = 32
"""Most examples in a batch, however small they are."""

BATCH_NUMBERS = 1_250_000
"""Most numbers of input in a batch: eight images of 3 x 224 x 224."""

LARGEST = 1e12
"""Largest absolute value of an input: beyond it, sums of squares of what a layer makes of it overflow in float32."""

HELD_OUT_SHARE = 0.2
"""Part of the inputs that nothing is fitted on, and everything is measured on."""

NO_INPUTS = "expected calibration inputs, found none; a few hundred are advised"
"""The message for a source without an example."""

REPEATED = 0.05
"""Part of the inputs that may repeat others unmentioned: data sets have a few such images."""

_COMPARED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types of whole numbers that torch can compare; it has larger unsigned types too, but hardly an operation on them."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Batches to fit on, other batches to measure on, and where they come from.

    ``kind`` is "data", "synthetic" or "weights only"; ``source`` and ``notes`` are sentences for the report.
    """

    fit: tuple[Inputs, ...]
    held_out: tuple[Inputs, ...]
    kind: Literal["data", "synthetic", "weights only"]
    source: str
    notes: tuple[str, ...] = ()

    def on(self, device: torch.device) -> "Calibration":
        """The same on a device."""
        fit, held_out = (tuple(moved(batch, device) for batch in part) for part in (self.fit, self.held_out))
        return replace(self, fit=fit, held_out=held_out)

    @property
    def fitted_on(self) -> int:
        """Number of examples the factors are fitted on."""
        return sum(len(inputs[0]) for inputs in self.fit)

    @property
    def held_out_count(self) -> int:
        """Number of examples everything is measured on."""
        return sum(len(inputs[0]) for inputs in self.held_out)


@dataclass(frozen=True, slots=True)
class InputsRead:
    """All that was read of a source: ``drawn`` says whether these are a random part of its examples, and so in another order."""

    inputs: Inputs
    source: str
    notes: list[str]
    drawn: bool


def read_calibration(
    source: object,
    example: Tensor | Inputs,
    *,
    import_object: Callable[[str], object] | None = None,
    names: Sequence[str] = (),
    reading: Reading | None = None,
    **options: Unpack[ReadingOptions],
) -> Calibration:
    """Examples from ``source``, checked against and converted to the shape and dtype of ``example``: a tensor, or one for each
    of the model's inputs, in the order of ``forward``'s parameters.

    ``options`` are the fields of :class:`Reading`, which ``reading`` gives as one value.
    ``source`` is a path (``.npy``, ``.npz``, ``.pt``, a folder of images, ``FILE.py:NAME`` that ``import_object``
    resolves), a tensor or array, a tuple of them (one for each model input), a data set, or an iterable of batches,
    whose first tensors count. A dictionary, or a batch that is one, gives the inputs by ``names``, those of ``forward``'s
    parameters; otherwise its values that are not called like labels, in their order. Raises CalibrationError when the source
    cannot be read or does not fit the model, or for numbers beyond LARGEST; UsageError for ``options`` beside ``reading``,
    or an ``example`` of another kind.
    """
    example = (example,) if isinstance(example, Tensor) else example
    if not isinstance(example, tuple | list) or not example or not all(isinstance(part, Tensor) for part in example):
        raise UsageError(
            "example: expected a tensor, or a tuple of tensors in the order of forward's parameters, found "
            f"{type(example).__name__}; give the inputs of a dictionary in that order, and their names as names="
        )
    if reading is not None and options:
        raise UsageError(f"reading: expected alone, found {', '.join(options)} beside it; give one or the other")
    how = reading or Reading(**options)
    read = read_inputs(source, example, how, import_object, names)
    fit, held_out = split_inputs(read.inputs, batch=how.batch or batch_size(read.inputs), seed=how.seed)
    return Calibration(fit, held_out, "data", read.source, (*read.notes, *_few(len(read.inputs[0]))))


def read_inputs(
    source: object,
    example: Inputs,
    how: Reading,
    import_object: Callable[[str], object] | None = None,
    names: Sequence[str] = (),
) -> InputsRead:
    """All that :func:`read_calibration` reads, not yet split, in the order of the source unless it is drawn.

    Raises CalibrationError.
    """
    scale, limit = _normalisation(how.mean, how.std, example[0]), how.limit or LIMIT
    opened = open_source(source, Request(example, limit, how.seed, how.resize, import_object, tuple(names), how.memory))
    inputs, notes = _collect(opened, example, limit)
    notes += [*opened.notes, *(() if opened.images else _of_arrays(how, opened.name))]
    if scale is not None:
        inputs = ((inputs[0] - scale[0]) / scale[1], *inputs[1:])
        _refuse_unusable(inputs[0], range(len(inputs[0])), f"{opened.name}, normalised")
    drawn = opened.total is not None and opened.total > len(inputs[0])
    return InputsRead(inputs, opened.name, notes, drawn)


def _of_arrays(how: Reading, name: str) -> Iterator[str]:
    """Notes on options for images of a folder, where the source is something else."""
    if how.resize is not None:
        yield f"resize counts for images of a folder alone: {name} was taken as it is"
    given = (("mean", how.mean), ("std", how.std))
    said = [f"{what} {', '.join(f'{number:g}' for number in numbers)}" for what, numbers in given if numbers]
    if said:
        yield f"{name} was normalised with {' and '.join(said)}"


def peek_example(source: str, names: Sequence[str] = ("input",)) -> Inputs | None:
    """The first example in a ``.npy``, ``.npz`` or ``.pt`` file, one tensor for each of the model's inputs ``names``.

    The numbers are those of the file, not yet converted. Images with the channels last, ``(H, W, 1)`` or ``(H, W, 3)``, are
    given channels first, as reading will move them. None for other sources. Raises CalibrationError for a file without one.
    """
    if Path(source).suffix.lower() not in (".npy", ".npz", ".pt", ".pth") or not Path(source).is_file():
        return None
    example = tuple(torch.empty(0) for _ in names)
    opened = open_source(Path(source), Request(example, 1, 0, None, None, tuple(names)))
    first = next((chunk.tensors for chunk in opened.chunks), ())
    if any(tensor.dim() == 0 for tensor in first):
        raise CalibrationError(
            f"{source}: expected the examples along the first axis, found a single number; give several"
        )
    if not first or any(len(tensor) == 0 for tensor in first):
        raise CalibrationError(f"{source}: {NO_INPUTS}")
    return tuple(_channels_first(tensor[:1]) for tensor in first)


def _channels_first(tensor: Tensor) -> Tensor:
    shape = tensor.shape[1:]
    last = len(shape) == 3 and shape[2] in (1, 3) and shape[0] not in (1, 3)
    return tensor.movedim(-1, 1) if last else tensor


def batch_size(inputs: Inputs) -> int:
    """Examples in a batch: what a layer makes of a batch, with however many channels, must fit in memory several times."""
    numbers = max(tensor[:1].numel() for tensor in inputs)
    return max(1, min(LARGEST_BATCH, BATCH_NUMBERS // max(1, numbers)))


def split_inputs(inputs: Inputs, *, batch: int, seed: int) -> tuple[tuple[Inputs, ...], tuple[Inputs, ...]]:
    """Batches to fit on, and the 20 % (at least one of two examples) to measure on, drawn by a seeded permutation."""
    count = len(inputs[0])
    held = held_out_of(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return _batches(inputs, order[held:], batch), _batches(inputs, order[:held], batch)


def held_out_of(count: int) -> int:
    """How many of ``count`` examples are held out."""
    return max(1, round(count * HELD_OUT_SHARE)) if count >= 2 else 0


def _batches(inputs: Inputs, chosen: Tensor, batch: int) -> tuple[Inputs, ...]:
    parts = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
    return tuple(tuple(tensor[rows] for tensor in inputs) for rows in parts)


def _few(count: int) -> tuple[str, ...]:
    if count >= FEW_INPUTS:
        return ()
    return (
        f"only {counted(count, 'calibration input')}, {FEW_INPUTS} or more are advised: fits may be better on these than on "
        "others",
    )


def _collect(source: Source, example: Inputs, limit: int) -> tuple[Inputs, list[str]]:
    """Read, check and convert until there are ``limit`` examples; returns them with the notes for the report."""
    notes: dict[str, None] = {}
    parts: list[Inputs] = []
    count = 0
    for chunk in source.chunks:
        part = _conform(chunk, example, source.name, notes)
        parts.append(tuple(tensor[: limit - count] for tensor in part))
        count += len(parts[-1][0])
        if count >= limit:
            break
    if count == 0:
        raise CalibrationError(f"{source.name}: {NO_INPUTS}")
    if source.total is not None and source.total > count:
        notes[f"{count} of {source.total} inputs used, drawn at random"] = None
    elif source.total is None and count == limit:
        notes[f"reading stopped after the first {counted(count, 'input')}"] = None
    inputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    repeated = count - len({_digest(inputs, index) for index in range(count)})
    if repeated > REPEATED * count:
        notes[
            f"{repeated} of {count} inputs are the same as another: they show nothing new, and where one of two is held out, the "
            "errors that are measured there are too small; give different ones"
        ] = None
    return inputs, list(notes)


def _digest(inputs: Inputs, index: int) -> bytes:
    """What tells one example from others."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in inputs:
        found.update(raw_bytes(tensor[index]))
    return found.digest()


def _conform(chunk: Chunk, example: Inputs, where: str, notes: dict[str, None]) -> Inputs:
    """One chunk in the layout and dtype of ``example``; raises CalibrationError for what does not fit."""
    converted = []
    for i, (found, wanted) in enumerate(zip(chunk.tensors, example, strict=True)):
        place = where if len(example) == 1 else f"{where}: input {i}"
        shaped = _with_layout(found, wanted, place, notes)
        numbers = _with_dtype(shaped, wanted, place, notes)
        _refuse_unusable(numbers, chunk.positions, place)
        converted.append(numbers)
    sizes = sorted({len(tensor) for tensor in converted})
    if len(sizes) != 1:
        raise CalibrationError(f"{where}: expected as many examples in every input of a batch, found {sizes}")
    return tuple(converted)


def _with_layout(found: Tensor, wanted: Tensor, where: str, notes: dict[str, None]) -> Tensor:
    shape = wanted.shape[1:]
    if found.shape[1:] == shape and found.dim() == wanted.dim():
        return found
    if len(shape) == 3 and found.shape[1:] == (*shape[1:], shape[0]):
        notes["channels were last in the inputs and have been moved to the front"] = None
        return found.movedim(-1, 1)
    if len(shape) == 3 and shape[0] == 1 and found.dim() == 3 and found.shape[1:] == shape[1:]:
        notes["inputs had no channel axis; one channel has been assumed"] = None
        return found[:, None]
    raise CalibrationError(
        f"{where}: expected inputs of shape (N, {', '.join(map(str, shape))}), found {tuple(found.shape)}; "
        "convert them, or give the model the example input they fit"
    )


def _with_dtype(found: Tensor, wanted: Tensor, where: str, notes: dict[str, None]) -> Tensor:
    if wanted.is_complex() and (found.is_complex() or found.is_floating_point()):
        return found.to(wanted.device, wanted.dtype)
    if not wanted.is_floating_point():
        if found.is_floating_point() or found.is_complex():
            raise CalibrationError(f"{where}: expected {wanted.dtype}, as the example input has, found {found.dtype}")
        _refuse_wrapped(found, wanted.dtype, where)
        return found.to(wanted.device, wanted.dtype)
    if found.is_floating_point():
        return found.to(wanted.device, wanted.dtype)
    if found.dtype == torch.uint8:
        notes["uint8 inputs were taken for pixels and scaled to [0, 1]"] = None
        return (found.to(torch.float32) / 255).to(wanted.device, wanted.dtype)
    raise CalibrationError(
        f"{where}: expected floating-point inputs or uint8 pixels, found {found.dtype}; convert them as for training, or, where "
        "the model takes whole numbers, as indices, give an example that has them (--input FILE.py:NAME)"
    )


def _refuse_wrapped(found: Tensor, wanted: torch.dtype, where: str) -> None:
    """Raise CalibrationError for whole numbers that the type of the model does not hold; any number can be a truth value."""
    if wanted.is_complex or torch.bool in (found.dtype, wanted) or found.dtype == wanted or found.numel() == 0:
        return
    values = found if found.dtype in _COMPARED else found.long()
    limits = torch.iinfo(wanted)
    for extreme in map(int, values.aminmax()):
        if not limits.min <= extreme <= limits.max:
            raise CalibrationError(
                f"{where}: expected whole numbers that {wanted} holds, as the example input has it, found {extreme}; convert "
                "them as the model expects"
            )


def _refuse_unusable(tensor: Tensor, positions: Sequence[int], where: str) -> None:
    """Raise CalibrationError for what is not finite, or so large that its square is not."""
    if tensor.numel() == 0:
        return
    if not bool(tensor.isfinite().all()):
        row = int(tensor.isfinite().logical_not().nonzero()[0, 0])
        raise CalibrationError(
            f"{where}: expected finite numbers, found NaN or infinity in example {positions[row]}; remove it"
        )
    if tensor.is_floating_point() and (largest := float(tensor.abs().max())) > LARGEST:
        row = int((tensor.abs() > LARGEST).nonzero()[0, 0])
        raise CalibrationError(
            f"{where}: expected numbers up to {LARGEST:.0e}, as a network is trained on, found {largest:.3g}, the first such "
            f"in example {positions[row]}; remove it, or normalise the inputs"
        )


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, example: Tensor
) -> tuple[Tensor, Tensor] | None:
    """``mean`` and ``std`` shaped to broadcast over channels; None when neither is given."""
    if mean is None and std is None:
        return None
    if not example.is_floating_point():
        raise CalibrationError(
            f"mean, std: expected a model that takes real numbers, found one that takes {example.dtype} and normalises them "
            "itself, if at all; leave them out"
        )
    last = example.dim() == 4 and example.shape[3] in (1, 3) and example.shape[1] not in (1, 3)
    channels = example.shape[3 if last else 1] if example.dim() > 1 else 1
    shape = (1, 1, 1, -1) if last else (1, -1, *[1] * (example.dim() - 2))[: example.dim()]
    values = []
    for name, numbers in (("mean", mean or (0.0,)), ("std", std or (1.0,))):
        if len(numbers) not in (1, channels):
            raise CalibrationError(f"{name}: expected 1 or {channels} numbers, one a channel, found {len(numbers)}")
        values.append(torch.tensor(list(numbers), dtype=example.dtype, device=example.device).reshape(shape))
    if not bool(values[0].isfinite().all()):
        raise CalibrationError(f"mean: expected finite numbers, found {list(mean or ())}")
    if not bool((values[1] > 0).all()) or not bool(values[1].isfinite().all()):
        raise CalibrationError(f"std: expected positive numbers, found {list(std or ())}")
    return values[0], values[1]
