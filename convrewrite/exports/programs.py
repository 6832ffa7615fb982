"""From a model of torch to an exported program, which some forms are made of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from convrewrite.axes import BATCH, at_least_two, axes_named, by_parameters, held_within
from convrewrite.errors import ExportError
from convrewrite.escaping import innermost_cause
from convrewrite.exports.export import Made, Source
from convrewrite.inputs import Inputs
from convrewrite.modules import named_outputs

Free = tuple[dict[int, str], ...]


class Flat(nn.Module):
    """Returns a model's tensors in the order of their names: other runtimes know no containers of torch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All outputs, one after the other."""
        return tuple(named_outputs(self.model(*inputs)).values())


def fixed_program(source: Source) -> ExportedProgram:
    """A program for inputs of the example's shapes, with flat outputs."""
    return torch.export.export(Flat(source.model), tuple(tensor.clone() for tensor in source.inputs), strict=False)


def free_program(source: Source) -> tuple[ExportedProgram, Made]:
    """A program that takes any size along the axes that were asked for; where nothing was asked, any number of examples if the
    model allows it."""
    inputs = source.inputs
    if source.free_axes is not None:
        free = axes_named(inputs, source.free_axes)
        any_batch = BATCH in source.free_axes
        return _program(source, free if source.free_axes else None), Made(
            None if any_batch else len(inputs[0]), source.beyond
        )
    try:
        return _program(source, axes_named(inputs, (BATCH,))), Made()
    except Exception as error:  # torch.export has many ways to say that a model holds on to its example
        size = inputs[0].shape[0]
        return _program(source, None), Made(size, notes=(f"batch size fixed at {size}: {innermost_cause(error)}",))


def _program(source: Source, free: Free | None) -> ExportedProgram:
    inputs: Inputs = tuple(tensor.clone() for tensor in source.inputs)  # torch marks on them which axes are free
    shapes: Any = None
    if free is not None:
        inputs = at_least_two(inputs) if any(BATCH in axes.values() for axes in free) else inputs
        shapes = by_parameters(source.model.forward, tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in free))
    program = torch.export.export(source.model, inputs, dynamic_shapes=shapes, strict=False)
    if free is not None and (reason := held_within(program, free)) is not None:
        raise ExportError(f"{type(source.model).__name__}: {reason}")
    return program
