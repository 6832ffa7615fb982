"""Which inputs a command runs models on: those it was given, noise of a stated or found shape, or calibration inputs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convrewrite import values
from convrewrite.calibration import peek_example, read_calibration
from convrewrite.errors import UsageError
from convrewrite.inputs import Inputs, bind_inputs, example_of, parameter_names, required_names
from convrewrite.loading import MOST_NUMBERS, Loaded, find_input_shape, import_object, parse_shape, stated_input_shapes
from convrewrite.runtime import OnnxModel

Network = nn.Module | OnnxModel


def for_model(loaded: Loaded, given: Sequence[str], calib: str | None) -> tuple[Inputs, tuple[str, ...]]:
    """One example for ``model``, and what was assumed for it, a sentence each.

    It is what ``given``, the values of ``--input``, says; else of the shape of the calibration inputs; else of one that the
    model accepts. Raises UsageError where the model takes several inputs and nothing says of which shapes.
    """
    model = loaded.model
    if given:
        return _given(model, given), ()
    names = required_names(model) or ("input",)  # a forward with *args alone names none
    if calib is not None and calib != "weights" and (peeked := peek_example(calib, names)) is not None:
        text = ", ".join("x".join(map(str, tensor.shape)) for tensor in peeked)
        return tuple(_like(tensor, model) for tensor in peeked), (f"input size {text} taken from {calib}",)
    if stated := stated_input_shapes(model):
        text = ", ".join("x".join(map(str, shape)) for shape in stated)
        made = tuple(_noise(shape, index, model) for index, shape in enumerate(stated))
        return made, (f"input size {text} is that of the exported program",)
    _require_one(names, loaded.source)
    shape, note = find_input_shape(model)
    return (_noise(shape, 0, model),), (note,)


def for_both(first: Network, second: Network, given: Sequence[str], calib: str | None, seed: int) -> Inputs:
    """Inputs that both take: the given ones, noise of a shape one of them states or is found for, or calibration inputs."""
    modules = [network for network in (first, second) if isinstance(network, nn.Module)]
    if given and values.example_target(given) is not None:
        if not modules:
            raise UsageError(f"--input {given[0]}: expected shapes, as 1x3x224x224, for two ONNX files")
        inputs = _given(modules[0], given)
    else:
        shapes = [parse_shape(text) for text in given] or _common_shapes(first, second, calib)
        inputs = tuple(_noise(shape, seed + index) for index, shape in enumerate(shapes))
    if calib is None:
        return inputs
    names = parameter_names(modules[0])[: len(inputs)] if modules else ()
    data = read_calibration(calib, inputs, seed=seed, import_object=import_object, names=names)
    return tuple(torch.cat(parts) for parts in zip(*data.fit, *data.held_out, strict=True))


def _given(model: nn.Module, given: Sequence[str]) -> Inputs:
    target = values.example_target(given)
    if target is None:
        return tuple(_noise(parse_shape(text), index, model) for index, text in enumerate(given))
    return bind_inputs(model, example_of(import_object(target), f"--input {target}"))


def _common_shapes(first: Network, second: Network, calib: str | None) -> list[tuple[int, ...]]:
    """Shapes of eight examples: of the calibration file, as an ONNX file states them, or found by running the module."""
    modules = [network for network in (first, second) if isinstance(network, nn.Module)]
    files = [network for network in (first, second) if isinstance(network, OnnxModel)]
    names = files[0].input_names if files else required_names(modules[0]) or ("input",)
    if files and modules and len(named := parameter_names(modules[0])) >= len(names):
        names = named[: len(names)]
    if calib is not None and (peeked := peek_example(calib, names)) is not None:
        return [tuple(tensor.shape) for tensor in peeked]
    for file in files:
        if all(isinstance(n, int) for shape in file.input_shapes for n in shape[1:]):
            return [(file.batch or 8, *(int(n or 1) for n in shape[1:])) for shape in file.input_shapes]
    if not modules:
        raise UsageError("neither ONNX file states its input shape; give it with --input")
    if stated := stated_input_shapes(modules[0]):
        return [(8, *shape[1:]) for shape in stated]
    _require_one(names, type(modules[0]).__name__)
    return [(8, *find_input_shape(modules[0])[0][1:])]


def _require_one(names: Sequence[str], where: str) -> None:
    if len(names) > 1:
        raise UsageError(
            f"{where}: forward takes {len(names)} inputs ({', '.join(names)}); give the shape of each, as "
            "--input 1x3x64x64 --input 1x10, or an example of all, --input FILE.py:NAME"
        )


def _like(tensor: Tensor, model: nn.Module) -> Tensor:
    """Noise for pixels and other real numbers; integers as they are, since they may be indices."""
    real = tensor.is_floating_point() or tensor.dtype == torch.uint8
    return _noise(tuple(tensor.shape), 0, model) if real else tensor


def _noise(shape: tuple[int, ...], seed: int, model: nn.Module | None = None) -> Tensor:
    """Normal numbers, in the dtype of the model's weights. Raises UsageError for more than MOST_NUMBERS."""
    if math.prod(shape) > MOST_NUMBERS or any(size < 0 for size in shape):
        text = "x".join(map(str, shape))
        raise UsageError(
            f"input: expected at most {MOST_NUMBERS} numbers, found a shape of {text}; give a smaller one with --input"
        )
    weights = () if model is None else model.parameters()
    dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
