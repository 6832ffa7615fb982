"""Example inputs of an ONNX graph, in the shapes and types that it states; for free axes several sizes are tried."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from convrewrite.errors import ConvRewriteError, UsageError
from convrewrite.inputs import ExampleInput, Inputs
from convrewrite.loading import MOST_NUMBERS
from convrewrite.onnx_files import ELEMENT_TYPES, OnnxModel
from convrewrite.values import shape_text

SIZES = (224, 320, 640, 64, 32, 28, 96, 112, 128, 256, 299, 384, 512, 1024, 4096, 16000)
"""Sizes of free axes that are tried, those of images first."""

DTYPES = {name: dtype for dtype, name in ELEMENT_TYPES.items()}
_NAMES = [name.removeprefix("tensor(").removesuffix(")") for name in DTYPES]


def example_of_graph(session: OnnxModel, given: ExampleInput | None = None) -> tuple[Inputs, tuple[str, ...]]:
    """One example in the order of the graph's inputs, and what was assumed for it, a sentence each.

    ``given``: a tensor, a tuple of them, or a dictionary by the names of inputs, which fixes those. Raises UsageError for
    names and numbers of inputs that the graph does not have, and where no size of its free axes runs.
    """
    known = _by_name(session, given)
    if unknown := [name for name in session.unranked if name not in known]:
        raise UsageError(
            f"input {', '.join(sorted(unknown))}: expected a shape, found that the graph states not even how many axes it has; "
            f"pass --input {min(unknown)}=1x3x224x224, or whatever it takes"
        )
    _require_examples(session)
    free = [name for name, shape in _shapes(session, known).items() if any(not isinstance(n, int) for n in shape[1:])]
    failed: ConvRewriteError | None = None
    for size in SIZES if free else SIZES[:1]:
        inputs = _example(session, known, size)
        try:
            session(*inputs)
        except ConvRewriteError as error:
            failed = failed or error
            continue
        if not free:
            return inputs, ()
        stated = ", ".join(f"{name} as {shape_text(inputs[session.input_names.index(name)].shape)}" for name in free)
        return inputs, (f"free axes of inputs got an example size: {stated}; pass --input NAME=SHAPE to change it",)
    assert failed is not None
    if not free:
        raise failed
    raise UsageError(
        f"input shape: expected a size of the free axes of {', '.join(free)} with which the graph runs, found none among "
        f"{', '.join(map(str, SIZES))}; pass --input NAME=SHAPE. The first failed with: {failed}"
    )


def _require_examples(session: OnnxModel) -> None:
    """Raise UsageError for an input that is stated to have no examples."""
    for name, shape in zip(session.input_names, session.input_shapes, strict=True):
        if len(shape) > 1 and shape[0] == 0:
            raise UsageError(
                f"input {name!r}: expected examples along its first axis, found that the graph states 0; export it with "
                "that axis free, or with the number that is meant"
            )


def noise_for(session: OnnxModel, shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of these shapes in the types of the graph: noise for real numbers, zeros for integers, which may be indices, and
    True for booleans."""
    return {name: _noise(session, session.input_names.index(name), shape, seed) for name, shape in shapes.items()}


def _noise(session: OnnxModel, index: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    kind, name = session.input_types[index], session.input_names[index]
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise UsageError(
            f"input {name!r}: expected a tensor of numbers in one of the types {', '.join(sorted(_NAMES))}, found {kind}; export "
            "the model with such an input, or cut that part of the graph off first"
        )
    if math.prod(shape) > MOST_NUMBERS:
        raise UsageError(
            f"input {name!r}: expected at most {MOST_NUMBERS} numbers, found a shape of {'x'.join(map(str, shape))}; give a "
            "smaller one with --input NAME=SHAPE, or export the model for smaller inputs"
        )
    if not dtype.is_floating_point:
        return torch.full(tuple(shape), int(dtype == torch.bool), dtype=dtype)
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed + index)).to(dtype)


def _by_name(session: OnnxModel, given: ExampleInput | None) -> dict[str, Tensor]:
    """What was given for the inputs, on the processor, and without a graph of gradients."""
    known = {} if given is None else _named(session, given)
    for name, tensor in known.items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"example input: expected a tensor for {name}, found {type(tensor).__name__}")
        if tensor.ndim > 1 and not len(tensor):
            raise UsageError(
                f"example input: expected at least one example along the first axis of {name}, found {shape_text(tensor.shape)}"
            )
    return {name: tensor.detach().cpu() for name, tensor in known.items()}


def _named(session: OnnxModel, given: ExampleInput) -> dict[str, Tensor]:
    names = session.input_names
    if isinstance(given, Mapping):
        if strangers := [str(name) for name in given if name not in names]:
            raise UsageError(
                f"example input: expected names of the graph's inputs ({', '.join(names)}), found {', '.join(strangers)}"
            )
        return dict(given)
    tensors: tuple[Any, ...] = tuple(given) if isinstance(given, list | tuple) else (given,)
    if len(tensors) != len(names) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise UsageError(
            f"example input: expected {len(names)} tensors ({', '.join(names)}), or a dictionary of them by name, found "
            f"{len(tensors)} of {', '.join(type(tensor).__name__ for tensor in tensors)}"
        )
    return dict(zip(names, tensors, strict=True))


def _shapes(session: OnnxModel, known: Mapping[str, Tensor]) -> dict[str, tuple[int | str | None, ...]]:
    """The shapes of the inputs that were not given, with the sizes that the names of their free axes have elsewhere."""
    sizes = _sizes_of_names(session, known)
    return {
        name: tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)
        for name, shape in zip(session.input_names, session.input_shapes, strict=True)
        if name not in known
    }


def _sizes_of_names(session: OnnxModel, known: Mapping[str, Tensor]) -> dict[str, int]:
    """What named axes have in the inputs that were given, and otherwise 1 if a first axis has that name: examples. A name that an
    input has twice, as some converters call all free axes alike, says nothing, nor does one of several sizes."""
    shapes = dict(zip(session.input_names, session.input_shapes, strict=True))
    alike = {size for shape in shapes.values() for size in shape if shape.count(size) > 1}
    sizes: dict[str, set[int]] = {}
    for name, tensor in known.items():
        for stated, size in zip(shapes[name], tensor.shape, strict=False):
            if isinstance(stated, str):
                sizes.setdefault(stated, set()).add(size)
    for shape in shapes.values():
        if shape and isinstance(shape[0], str):
            sizes.setdefault(shape[0], {1})
    return {name: size for name, (size, *others) in sizes.items() if not others and name not in alike}


def _example(session: OnnxModel, known: Mapping[str, Tensor], size: int) -> Inputs:
    made: list[Tensor] = []
    shapes = _shapes(session, known)
    for index, name in enumerate(session.input_names):
        if name in known:
            made.append(_in_type(known[name], DTYPES.get(session.input_types[index])))
            continue
        sizes = enumerate(shapes[name])
        made.append(_noise(session, index, [n if isinstance(n, int) else size if axis else 1 for axis, n in sizes]))
    return tuple(made)


def _in_type(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Real numbers in the precision of the graph; everything else as it was given, to be refused where it does not fit."""
    real = dtype is not None and dtype.is_floating_point and tensor.is_floating_point()
    return tensor.to(dtype) if real else tensor
