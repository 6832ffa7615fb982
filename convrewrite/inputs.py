"""What a model is called with: tensors in the order of its forward's parameters, however the caller names them.

A caller gives one tensor, a tuple of them, a dictionary by the names of ``forward``'s parameters, or both. They are bound to
positions once, here: every later stage works with a plain tuple, and an ONNX file takes its inputs in the same order.
"""

import inspect
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import UsageError
from convrewrite.escaping import message_of
from convrewrite.process import ordinary
from convrewrite.values import shape_text

Inputs = tuple[Tensor, ...]
"""The positional inputs of a model; the batch is the first axis of each."""

ExampleInput = Tensor | Sequence[Any] | Mapping[str, Tensor]
"""A tensor, a tuple of tensors, a dictionary of keyword tensors, or ``(args, kwargs)``."""

INPUT_NAMES = "convrewrite.input_names"
"""The key in the ``meta`` of a module made of an ONNX graph that holds its inputs' names, which need not be Python
identifiers."""

LOOKED_AT = 64
"""How many numbers of an input decide, at most, which random numbers a model draws when it runs on it."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_EXPECTED = "a tensor, a tuple of tensors, a dictionary of keyword tensors, or (args, kwargs)"


_OF_TYPES = re.compile(r"dtype|scalar type|Input type|data type")


def about_types(message: str) -> bool:
    """Whether what an error of torch says is about the type of an input's numbers, and not about its shape."""
    return _OF_TYPES.search(message) is not None


def bind_inputs(model: nn.Module, example: ExampleInput) -> Inputs:
    """The tensors of ``example`` in the order in which ``forward`` takes them.

    Raises UsageError for anything but tensors, for names that ``forward`` does not have or takes by keyword only, and
    where an optional parameter before a given one was left out, which a tuple cannot express.
    """
    positional, named = _parts(example)
    where = type(model).__name__
    if len(positional) > 1 and all(isinstance(value, int) for value in positional):
        raise UsageError(
            f"example input: expected a tensor, found a shape; give one as torch.randn({tuple(positional)})"
        )
    for name, value in (*enumerate(positional), *named.items()):
        if not isinstance(value, Tensor):
            found = type(value).__name__
            raise UsageError(f"example input {name!r}: expected a tensor, found {found}; {wrapping(where)}")
        if value.is_meta:
            raise UsageError(
                f"example input {name!r}: expected numbers, found a tensor on the meta device, which holds none; give one as "
                f"torch.randn({tuple(value.shape)})"
            )
    if not positional and not named:
        raise UsageError(f"example input: expected {_EXPECTED}, found none")
    require_room(model, len(positional))
    return (*positional, *_keywords(model, len(positional), named))


def require_room(model: nn.Module, count: int) -> None:
    """Raise UsageError where ``forward`` does not take so many inputs by position."""
    try:
        parameters, names = inspect.signature(model.forward).parameters.values(), parameter_names(model)
    except (TypeError, ValueError):  # it does not say what it takes
        return
    if count <= len(names) or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return
    where, only = type(model).__name__, [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    takes = f", and {', '.join(only)} by keyword only" if only else ""
    raise UsageError(
        f"{where}: expected inputs for the parameters that forward takes by position ({', '.join(names) or 'none'}{takes}), "
        f"found {count} of them; give one for each, or {wrapping(where)}"
    )


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that ``forward`` takes by position, optional ones too; without ``*args``. Those of a module
    made of an ONNX graph are the graph's."""
    stated: tuple[str, ...] | None = getattr(model, "meta", {}).get(INPUT_NAMES)
    if stated is not None:
        return stated
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in _POSITIONAL)


def required_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of ``forward`` without a default; the first one always counts as an input."""
    parameters = inspect.signature(model.forward).parameters
    if getattr(model, "meta", {}).get(INPUT_NAMES) is not None:
        return parameter_names(model)
    return tuple(
        name
        for index, name in enumerate(parameter_names(model))
        if index == 0 or parameters[name].default is inspect.Parameter.empty
    )


def shapes_of(inputs: Inputs) -> str:
    """The shapes of all inputs, for a message: ``1x3x8x8, 1x4``."""
    return shape_text(*(tensor.shape for tensor in inputs))


def require_common_batch(inputs: Inputs) -> None:
    """Raise UsageError unless every input has the batch as its first axis, of one size, with an example in it."""
    if any(tensor.ndim == 0 for tensor in inputs) or len({tensor.shape[0] for tensor in inputs}) > 1:
        raise UsageError(
            f"example input: expected the batch as first axis of every input, of one size, found {shapes_of(inputs)}; "
            "give every input a batch axis, or let a wrapping module hold what is the same for all examples as a buffer"
        )
    if inputs and not len(inputs[0]):
        raise UsageError(
            f"example input: expected one example or more, found none ({shapes_of(inputs)}); give a batch of one"
        )


def examples_in(inputs: Inputs) -> int:
    """How many examples these inputs have, by the first of them that has axes: a single number is the same for all examples."""
    return next((len(tensor) for tensor in inputs if tensor.ndim), 1)


def in_batches_of(batches: Sequence[Inputs], size: int) -> tuple[Inputs, ...]:
    """The same examples, ``size`` at a time; an incomplete last batch is left out."""
    if not batches:
        return ()
    together = tuple(torch.cat(column) if len(column) > 1 else column[0] for column in zip(*batches, strict=True))
    count = len(together[0]) // size
    return tuple(tuple(tensor[i * size : (i + 1) * size] for tensor in together) for i in range(count))


def in_whole_batches(batches: Sequence[Inputs], size: int) -> tuple[Inputs, ...]:
    """As :func:`in_batches_of`; fewer than ``size`` examples are repeated until they fill one batch."""
    found = in_batches_of(batches, size)
    if found or not batches:
        return found
    together = [torch.cat(column) for column in zip(*batches, strict=True)]
    return (tuple(tensor[torch.arange(size, device=tensor.device) % len(tensor)] for tensor in together),)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on a device; those that lie there already are not copied."""
    return tuple(tensor.to(device) for tensor in inputs)


def varied(inputs: Inputs) -> Inputs:
    """Other numbers of the same shapes, in the range of the given ones if that includes 0.5, to show what depends on the
    numbers."""
    return tuple(
        (tensor.flip(-1) * 0.5 + 0.25 if tensor.is_floating_point() else tensor.flip(-1)) if tensor.ndim else tensor
        for tensor in inputs
    )


def seed_of(inputs: Inputs) -> int:
    """A seed for what a model draws when it runs on these inputs: the same for the same numbers, mostly another for others."""
    shown = [tensor.flatten()[:: 1 + tensor.numel() // LOOKED_AT].tolist() for tensor in inputs]
    return zlib.crc32(repr(shown).encode())


def enlarged(inputs: Inputs) -> Iterator[Inputs]:
    """Inputs of other sizes, made of these: first in twice as large a batch, then twice as long along the last axis, then along
    the last two; batch and channels do not count. They show what depends on a size, in a model that takes other sizes."""
    yield tuple(torch.cat([tensor, tensor.flip(-1)]) if tensor.ndim else tensor for tensor in inputs)
    longer = tuple(torch.cat([tensor, tensor], -1) if tensor.ndim > 2 else tensor for tensor in inputs)
    yield longer
    yield tuple(torch.cat([tensor, tensor], -2) if tensor.ndim > 3 else tensor for tensor in longer)


def example_of(source: object, where: str) -> ExampleInput:
    """The example that an object is, or that a callable without arguments returns; raises UsageError naming ``where``."""
    if isinstance(source, Tensor | Mapping | tuple | list):
        return source
    if not callable(source):
        raise UsageError(f"{where}: expected {_EXPECTED}, or a callable giving one, found {type(source).__name__}")
    try:
        made = source()
    except Exception as error:  # the caller's own code may raise anything
        raise UsageError(
            f"{where}: calling it without arguments raised {type(error).__name__}: {message_of(error)}"
        ) from error
    if not isinstance(made, Tensor | Mapping | tuple | list):
        raise UsageError(f"{where}: expected {_EXPECTED} from calling it, found {type(made).__name__}")
    return made


def _parts(example: object) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword inputs. A dictionary at the end of a tuple holds keywords, as in ``(args, kwargs)``."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), example
    if not isinstance(example, tuple | list):
        raise UsageError(f"example input: expected {_EXPECTED}, found {type(example).__name__}")
    if not example or not isinstance(example[-1], Mapping):
        return tuple(example), {}
    before = example[:-1]
    nested = len(before) == 1 and isinstance(before[0], tuple | list)
    return tuple(before[0] if nested else before), example[-1]


def _keywords(model: nn.Module, positional: int, named: Mapping[str, Tensor]) -> Inputs:
    """The keyword inputs in the order of ``forward``'s parameters after the first ``positional`` ones."""
    if not named:
        return ()
    where, names = type(model).__name__, parameter_names(model)
    parameters = inspect.signature(model.forward).parameters
    only = [name for name in named if name in parameters and name not in names]
    if only:
        raise UsageError(f"{where}: forward takes {', '.join(only)} by keyword only; {wrapping(where)}")
    strangers = [str(name) for name in named if name not in names]
    if strangers:
        has = ", ".join(names) or "none by position"
        raise UsageError(
            f"{where}: expected names of forward's parameters ({has}), found {', '.join(strangers)}; give inputs by these, or, "
            f"where forward takes a dictionary of tensors, {wrapping(where)}"
        )
    twice = [name for name in names[:positional] if name in named]
    if twice:
        raise UsageError(f"{where}: {', '.join(twice)} was given by position and by keyword; give it once")
    wanted = names[positional : positional + len(named)]
    missing = [name for name in wanted if name not in named]
    if missing:
        behind = next(name for name in reversed(names) if name in named)
        raise UsageError(
            f"{where}: forward takes {', '.join(missing)} before {behind}, and no value was given; "
            f"give one, or {wrapping(where)}"
        )
    return tuple(named[name] for name in wanted)


def wrapping(where: str) -> str:
    """What to do with a model whose forward takes something else than tensors by position."""
    return f"wrap the model in a module whose forward takes tensors by position and calls {where} with them as it needs"


def bound_inputs(model: nn.Module, example_input: ExampleInput) -> Inputs:
    """The example as the tuple of positional inputs, with which torch can differentiate. Raises UsageError."""
    inputs = bind_inputs(model, example_input)
    require_common_batch(inputs)
    return ordinary(inputs)
