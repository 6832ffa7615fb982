"""Shapes of example inputs: as they are written, as a program states them, and as a model accepts them."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convrewrite.errors import TraceError, UsageError
from convrewrite.escaping import message_of, summary
from convrewrite.inputs import about_types, require_room
from convrewrite.modules import eval_mode, preserved
from convrewrite.state import parameters_of
from convrewrite.values import shape_text, shown

# Pixels on a side of an image, and numbers in a sequence, in the order in which they are tried.
_INPUT_SIZES = (224, 32, 28, 64, 128, 256, 299, 512)
_INPUT_LENGTHS = (1024, 128, 256, 512, 4096, 16000)

MOST_NUMBERS = 1 << 26
"""Most numbers in an input whose shape is given: a volume of 4 x 256 x 256 x 256. The outputs of layers
take many times its memory."""

# As many axes as an input may have; a convolution of volumes takes five.
_MOST_AXES = 8


def parse_shape(text: str) -> tuple[int, ...]:
    """``1x3x224x224`` -> ``(1, 3, 224, 224)``; raises UsageError otherwise."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text, re.ASCII):
        raise UsageError(f"input shape {shown(text)}: expected positive integers joined by x, such as 1x3x224x224")
    parts = text.split("x")
    too_long = len(parts) > _MOST_AXES or any(len(part) > len(str(MOST_NUMBERS)) for part in parts)
    if too_long or math.prod(map(int, parts)) > MOST_NUMBERS:
        found = shown(text) if too_long else f"{text}, which is {math.prod(map(int, parts))}"
        raise UsageError(f"input shape: expected at most {MOST_NUMBERS} numbers in {_MOST_AXES} axes, found {found}")
    return tuple(map(int, parts))


def initial_input_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Likely input shapes, judging by the first Conv2d or Conv1d: ``(1, channels, size, size)`` or ``(1, channels, length)``;
    empty if the model has neither."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv1d)), None)
    if isinstance(first, nn.Conv1d):
        return [(1, first.in_channels, length) for length in _INPUT_LENGTHS]
    return [] if first is None else [(1, first.in_channels, size, size) for size in _INPUT_SIZES]


def find_input_shape(model: nn.Module) -> tuple[tuple[int, ...], str]:
    """The first likely input shape the model accepts, and a sentence that states the assumption; raises TraceError, and
    UsageError for a model that takes no input by position."""
    require_room(model, 1)
    candidates = initial_input_shapes(model)
    if not candidates:
        raise TraceError(
            "input shape: expected a Conv2d or Conv1d to take it from, found none in the model; pass --input SHAPE"
        )
    first_error: Exception | None = None
    with preserved(model), eval_mode(model), torch.no_grad():
        for shape in candidates:
            try:
                model(_example(model, shape))
            except Exception as error:  # any model may fail on a wrong shape in any way
                first_error = first_error or error
            else:
                return shape, f"input size assumed {shape_text(shape)}; pass --input to change it"
    tried = shape_text(*candidates)
    raise TraceError(
        f"input shape: none of {tried} runs through the model; {_advice(first_error)}. The first failed with "
        f"{summary(first_error)}"
    ) from first_error


def _advice(error: Exception | None) -> str:
    """What to pass, as noise of any shape has the type of the weights."""
    if about_types(message_of(error)):
        return "pass an example with numbers of the type that it takes, as indices, --input FILE.py:NAME"
    return "pass --input SHAPE"


def runs_on(model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether the model accepts zeros of these shapes, one for each of its inputs."""
    with preserved(model), eval_mode(model), torch.no_grad():
        try:
            model(*(_example(model, shape) for shape in shapes))
        except Exception:  # any model may fail on a wrong shape in any way
            return False
    return True


def _example(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    weight = next((p for p in parameters_of(model) if p.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


SHAPES = "convrewrite.input_shapes"


def stated_input_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of one example of a rebuilt program's inputs; empty for other models, and where an input holds integers."""
    found: list[tuple[int, ...]] = getattr(model, "meta", {}).get(SHAPES, [])
    return found
