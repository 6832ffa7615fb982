"""Which inputs a command runs models on: those it was given, noise of a stated or found shape, or calibration inputs."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from convrewrite import values
from convrewrite.calibration import peek_example
from convrewrite.cli.known_sizes import KnownSizes
from convrewrite.errors import CalibrationError, TraceError, UsageError
from convrewrite.inputs import ExampleInput, Inputs, bind_inputs, example_of, parameter_names, required_names, shapes_of
from convrewrite.loading import (
    MOST_NUMBERS,
    Loaded,
    find_input_shape,
    import_object,
    parse_shape,
    runs_on,
    stated_input_shapes,
)
from convrewrite.modules import eval_mode, preserved, run
from convrewrite.onnx_files import OnnxModel
from convrewrite.onnx_graph import noise_for
from convrewrite.state import parameters_of

Network = nn.Module | OnnxModel


def for_model(
    loaded: Loaded, given: Sequence[str], calib: str | None, known: KnownSizes | None = None
) -> tuple[Inputs, tuple[str, ...]]:
    """One example for ``model``, and what was assumed for it, a sentence each.

    It is what ``given``, the values of ``--input``, says; otherwise it has the shape of the calibration inputs, that of an
    exported program, the one ``known`` from a report, or that of the example which a module of Lightning keeps; otherwise one
    that the model accepts. Raises UsageError where the model takes several inputs and nothing states their shapes.
    """
    model = loaded.model
    if given:
        return given_example(model, given), ()
    names = required_names(model) or ("input",)  # a forward with *args alone names none
    if calib is not None and (peeked := peek_example(calib, names)) is not None:
        example = tuple(_like(tensor, model) for tensor in as_images(peeked, model))
        _require_running(model, example, calib)
        return example, (f"input size {shapes_of(example)} taken from {calib}",)
    if stated := stated_input_shapes(model):
        made = tuple(noise(shape, index, model) for index, shape in enumerate(stated))
        return made, (f"input size {values.shape_text(*stated)} is that of the exported program",)
    if known is not None and runs_on(model, known.shapes):
        return tuple(noise(shape, index, model) for index, shape in enumerate(known.shapes)), (known.note,)
    if (own := _own_example(model)) is not None:
        return own, (f"input size {shapes_of(own)} is that of the model's example_input_array",)
    require_one(names, loaded.source)
    shape, note = find_input_shape(model)
    return (noise(shape, 0, model),), (note,)


def as_images(peeked: Inputs, model: nn.Module) -> Inputs:
    """The first example of a file in four axes for a model of images that takes those: grey images may have no axis for their
    channel, and of a list of single images the first axis was taken for a batch."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv1d)), None)
    if not isinstance(first, nn.Conv2d) or len(peeked) != 1 or peeked[0].dim() != 3:
        return peeked
    image = peeked[0].expand(first.in_channels, -1, -1)[None]
    return (image,) if runs_on(model, [tuple(image.shape)]) else peeked


def for_graph(
    session: OnnxModel,
    given: Sequence[str],
    calib: str | None,
    known: KnownSizes | None = None,
    *,
    of_examples: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[ExampleInput | None, tuple[str, ...]]:
    """What is known of an ONNX graph's inputs, by name, and what was assumed for it: ``given``, the values of ``--input``,
    otherwise the sizes of the calibration inputs, or those ``known`` from a report, where the graph leaves them free.
    ``of_examples``: the inputs that calibration files and reports hold, None for all. Shapes without names are those of all
    inputs, or of these. Raises UsageError for other names or another number of inputs than the graph has."""
    target = values.example_target(given)
    if target is not None:
        return example_of(import_object(target), f"--input {target}"), ()
    names = session.input_names if of_examples is None else tuple(of_examples)
    if given:
        in_order = len(given) == len(names) and all(values.named_shape(text)[0] is None for text in given)
        return noise_for(session, named_shapes(given, names if in_order else session.input_names), seed), ()
    if calib is not None and (peeked := peek_example(calib, names)) is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in zip(names, peeked, strict=True)}
        return noise_for(session, fitting(session, shapes), seed), ()
    if known is None or len(known.shapes) != len(names) or states_sizes(session):
        return None, ()
    shapes = dict(zip(names, known.shapes, strict=True))  # a report has no shapes of inputs without examples
    return noise_for(session, fitting(session, shapes), seed), (known.note,)


def states_sizes(file: OnnxModel) -> bool:
    """Whether an ONNX file leaves no axis free but the first."""
    return all(isinstance(n, int) for shape in file.input_shapes for n in shape[1:])


def fitting(session: OnnxModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes by the names of inputs, those of images also with their channels last; without those that do not fit."""
    stated = dict(zip(session.input_names, session.input_shapes, strict=True))
    found = {
        name: shape
        if name in session.unranked
        else next(filter(None, (_filled(stated[name], one) for one in (shape, _last_first(shape)))), None)
        for name, shape in shapes.items()
    }
    return {name: shape for name, shape in found.items() if shape is not None}


def _filled(stated: Sequence[int | str | None], shape: Sequence[int]) -> tuple[int, ...] | None:
    """A shape as a graph states it, with the numbers of ``shape`` for its free axes; None where the two do not fit."""
    if len(stated) != len(shape) or any(
        isinstance(a, int) and a != b for a, b in zip(stated[1:], shape[1:], strict=True)
    ):
        return None
    first = stated[0] if stated and isinstance(stated[0], int) else 1
    return (first, *shape[1:])


def _last_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """An image's shape with the axis of channels, which was moved to the front, at the end again."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape


def named_shapes(given: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of inputs; those without one in the order of the inputs."""
    entries = [values.named_shape(entry) for entry in given]
    if not names:
        raise UsageError(
            f"--input: expected shapes without names, as the model names no inputs, found {values.shown(' '.join(given))}"
        )
    unnamed = [shape for name, shape in entries if name is None]
    if unnamed and (len(unnamed) != len(given) or len(given) != len(names)):
        raise UsageError(
            f"--input: expected {len(names)} shapes, in the order of the inputs {', '.join(names)}, or shapes by name, as "
            f"{names[0]}=1x3x224x224, found {values.shown(' '.join(given))}"
        )
    named = dict(zip(names, unnamed, strict=True)) if unnamed else {str(name): shape for name, shape in entries}
    if strangers := [name for name in named if name not in names]:
        raise UsageError(
            f"--input: expected names of inputs ({', '.join(names)}), found {values.shown(', '.join(strangers))}"
        )
    if len(named) < len(given):
        raise UsageError(f"--input: expected every input once, found {values.shown(' '.join(given))}")
    return {name: parse_shape(shape) for name, shape in named.items()}


def given_example(model: nn.Module, given: Sequence[str], seed: int = 0) -> Inputs:
    """What ``given``, the values of ``--input``, says for a module: shapes are filled with noise, drawn from ``seed`` on."""
    target = values.example_target(given)
    if target is None and any(values.named_shape(text)[0] is not None for text in given):
        names = parameter_names(model)
        shapes = named_shapes(given, names)
        return bind_inputs(model, {name: noise(shapes[name], seed + names.index(name), model) for name in shapes})
    if target is None:
        return tuple(noise(parse_shape(text), seed + index, model) for index, text in enumerate(given))
    return bind_inputs(model, example_of(import_object(target), f"--input {target}"))


def require_one(names: Sequence[str], where: str) -> None:
    """Raise UsageError for several inputs whose shapes nothing states."""
    if len(names) > 1:
        raise UsageError(
            f"{where}: forward takes {len(names)} inputs ({', '.join(names)}); give the shape of each, as "
            "--input 1x3x64x64 --input 1x10, or an example of all, --input FILE.py:NAME"
        )


def _own_example(model: nn.Module) -> Inputs | None:
    """The first of the examples that a module of Lightning keeps; None where it keeps none, keeps a single number beside
    them, which has no first one, or does not run on it."""
    kept = getattr(model, "example_input_array", None)
    if kept is None:
        return None
    try:
        bound = bind_inputs(model, example_of(kept, "example_input_array"))
        if any(tensor.ndim == 0 or len(tensor) == 0 for tensor in bound):
            return None
        own = tuple(tensor[:1].detach() for tensor in bound)
        with preserved(model), eval_mode(model):
            run(model, own)
    except (UsageError, TraceError):
        return None
    return own


def _require_running(model: nn.Module, example: Inputs, calib: str) -> None:
    """Raise CalibrationError, which names the file of an example, where the model does not run on the example."""
    try:
        with preserved(model), eval_mode(model):
            run(model, example)
    except TraceError as error:
        raise CalibrationError(f"{calib}: expected examples as the model takes them; {error}") from error


def _like(tensor: Tensor, model: nn.Module) -> Tensor:
    """Noise for pixels and other real numbers; integers as they are, since they may be indices."""
    return tensor if is_whole(tensor) else noise(tuple(tensor.shape), 0, model)


def is_whole(tensor: Tensor) -> bool:
    """Whether it holds neither pixels nor other real numbers."""
    return not tensor.is_floating_point() and tensor.dtype != torch.uint8


def noise(shape: tuple[int, ...], seed: int, model: nn.Module | None = None) -> Tensor:
    """Normal numbers, in the dtype of the model's weights. Raises UsageError for more than MOST_NUMBERS."""
    if math.prod(shape) > MOST_NUMBERS or any(size < 0 for size in shape):
        found = values.shape_text(shape)
        raise UsageError(
            f"input: expected at most {MOST_NUMBERS} numbers, found a shape of {found}; give a smaller one with --input"
        )
    weights = () if model is None else parameters_of(model)
    dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
