"""Named axes of inputs along which an exported file takes any size, and inputs of another size to try that with."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from convrewrite.errors import UsageError
from convrewrite.inputs import Inputs, shapes_of

BATCH = "batch"

LEAST_RANKS = {BATCH: 1, "height": 4, "width": 3}
"""Fewest axes of an input that has an axis of this name: height and width are the last two of an image, width is the last
of a sequence of vectors, (N, C, W)."""


LARGEST_SIZE = 2**31
"""Longest axis that an input may have: what torch takes for no bound is beyond."""

ANY_BATCH = 2
"""Fewest examples that torch assumes a free batch has."""


def axes_named(inputs: Inputs, names: Sequence[str]) -> tuple[dict[int, str], ...]:
    """For every input its free axes, position -> name. Axes of one name but different sizes get different names.

    Raises UsageError for a name that no input has an axis of.
    """
    found: list[dict[int, str]] = [{} for _ in inputs]
    for name in names:
        sizes: dict[int, str] = {}
        for tensor, axes in zip(inputs, found, strict=True):
            if tensor.ndim >= LEAST_RANKS[name]:
                position = position_of(name, tensor.ndim)
                size = tensor.shape[position]
                axes[position] = sizes.setdefault(size, f"{name}_{len(sizes)}" if sizes else name)
        if not sizes:
            raise UsageError(
                f"--free-axes: expected an input with an axis for {name}, found {shapes_of(inputs)}; leave {name} out"
            )
    return tuple(found)


def by_parameters(forward: Callable[..., object], free: Sequence[Mapping[int, object]]) -> tuple[object, ...]:
    """The free axes of every input in the form that torch asks for: those of ``*inputs`` are in a tuple of their own."""
    return tuple(inspect.signature(forward).bind(*free).arguments.values())


def position_of(name: str, rank: int) -> int:
    """Where the axis of this name is."""
    return {BATCH: 0, "height": rank - 2, "width": rank - 1}[name]


def doubled(inputs: Inputs, name: str) -> Inputs:
    """The inputs at twice the size along this axis, each followed by its mirror image, so that values do not jump where they
    meet."""
    return tuple(_mirrored(x, position_of(name, x.ndim)) if x.ndim >= LEAST_RANKS[name] else x for x in inputs)


def _mirrored(tensor: Tensor, position: int) -> Tensor:
    """The tensor, followed by its mirror image along one axis."""
    return torch.cat([tensor, tensor.flip(position)], position)


def of_another_size(inputs: Inputs, free: Sequence[Mapping[int, str]]) -> Inputs:
    """The inputs with another size along each of their free axes: a single example, which costs least, and the other axes twice
    as long, each followed by its mirror image."""
    others = []
    for tensor, axes in zip(inputs, free, strict=True):
        for position, name in axes.items():
            single = name == BATCH and tensor.shape[position] > 1
            tensor = tensor.narrow(position, 0, 1) if single else _mirrored(tensor, position)
        others.append(tensor)
    return tuple(others)


def beyond_batch(free_axes: Iterable[str] | None) -> tuple[str, ...]:
    """Axes that are to be free besides the batch."""
    return tuple(name for name in free_axes or () if name != BATCH)


def at_least_two(inputs: Inputs) -> Inputs:
    """The inputs, one example twice: torch.export takes an axis of length 1 for a constant, so that a batch of one would be
    exported as fixed."""
    return tuple(torch.cat([tensor, tensor]) if tensor.shape[:1] == (1,) else tensor for tensor in inputs)


def held_within(program: ExportedProgram, free: Sequence[Mapping[int, str]]) -> str | None:
    """Why an exported program does not compute what its model does at every size of these axes of its inputs; None if nothing
    says so. A forward that branches on a size is exported along the branch that the example took, and torch notes for which sizes
    that is right. Least heights and widths do not count, as every kernel has them: the model does not run on less either.
    """
    inputs = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for name, axes in zip(program.graph_signature.user_inputs, free, strict=True):
        for position, axis in axes.items():
            size = inputs[name].shape[position]
            bounds = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if bounds is None:
                continue
            if bounds.upper < LARGEST_SIZE:
                return f"the exported graph is right only where the {axis} is at most {bounds.upper}"
            if position_of(BATCH, inputs[name].ndim) == position and bounds.lower > ANY_BATCH:
                return f"the exported graph is right only where the {axis} is at least {bounds.lower}"
    return None
