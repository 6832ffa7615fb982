"""Example inputs of an ONNX graph: as it states their shapes and types, free axes being given a size that is tried."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from convrewrite.errors import ConvRewriteError, UsageError
from convrewrite.inputs import ExampleInput, Inputs
from convrewrite.runtime import ELEMENT_TYPES, OnnxModel

SIZES = (224, 320, 640, 64, 32, 28, 96, 112, 128, 256, 299, 384, 512, 1024, 4096, 16000)
"""Sizes of free axes that are tried, those of images first."""

DTYPES = {name: dtype for dtype, name in ELEMENT_TYPES.items()}


def example_of_graph(session: OnnxModel, given: ExampleInput | None = None) -> tuple[Inputs, tuple[str, ...]]:
    """One example in the order of the graph's inputs, and what was assumed for it, a sentence each.

    ``given``: a tensor, a tuple of them, or a dictionary by the names of inputs, which fixes those. Raises UsageError for
    names and numbers of inputs that the graph does not have, and where no size of its free axes runs.
    """
    known = _by_name(session, given)
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
        stated = ", ".join(f"{name} as {_times(inputs[session.input_names.index(name)])}" for name in free)
        return inputs, (f"free axes of inputs got an example size: {stated}; pass --input NAME=SHAPE to change it",)
    assert failed is not None
    if not free:
        raise failed
    raise UsageError(
        f"input shape: expected a size of the free axes of {', '.join(free)} with which the graph runs, found none among "
        f"{', '.join(map(str, SIZES))}; pass --input NAME=SHAPE. The first failed with: {failed}"
    )


def _by_name(session: OnnxModel, given: ExampleInput | None) -> dict[str, Tensor]:
    names = session.input_names
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if strangers := [str(name) for name in given if name not in names]:
            raise UsageError(
                f"example input: expected names of the graph's inputs ({', '.join(names)}), found {', '.join(strangers)}"
            )
        return dict(given)
    tensors: Sequence[Tensor] = (given,) if isinstance(given, Tensor) else given
    if len(tensors) != len(names) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise UsageError(
            f"example input: expected {len(names)} tensors ({', '.join(names)}), or a dictionary of them by name, found "
            f"{len(tensors)} of {', '.join(type(tensor).__name__ for tensor in tensors)}"
        )
    return dict(zip(names, tensors, strict=True))


def _shapes(session: OnnxModel, known: Mapping[str, Tensor]) -> dict[str, tuple[int | str | None, ...]]:
    return {
        name: shape for name, shape in zip(session.input_names, session.input_shapes, strict=True) if name not in known
    }


def _example(session: OnnxModel, known: Mapping[str, Tensor], size: int) -> Inputs:
    """Noise for real numbers, zeros for integers, which may be indices, and True."""
    made: list[Tensor] = []
    for index, (name, shape) in enumerate(zip(session.input_names, session.input_shapes, strict=True)):
        dtype = DTYPES.get(session.input_types[index])
        if dtype is None:
            raise UsageError(
                f"input {name!r}: expected a tensor of numbers, found {session.input_types[index]}; "
                "cut that part of the graph off first"
            )
        if name in known:
            tensor = known[name]
            made.append(tensor.to(dtype) if tensor.is_floating_point() == dtype.is_floating_point else tensor)
            continue
        sizes = [n if isinstance(n, int) else 1 if axis == 0 else size for axis, n in enumerate(shape)]
        if not dtype.is_floating_point:
            made.append(torch.full(sizes, int(dtype == torch.bool), dtype=dtype))
            continue
        generator = torch.Generator().manual_seed(index)
        made.append(torch.randn(sizes, generator=generator).to(dtype))
    return tuple(made)


def _times(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
