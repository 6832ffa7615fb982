"""Running a model: once, without gradients, in eval mode, with the same random numbers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import TraceError
from convrewrite.escaping import first_line
from convrewrite.inputs import Inputs, about_types, seed_of, shapes_of, wrapping
from convrewrite.modules.outputs import named_outputs
from convrewrite.process import quiet, same_random_numbers
from convrewrite.state import parameters_of

_OF_DEVICES = re.compile(r"on the same device|device type|device index")
"""What they say where an input lies on another device than the weights."""

_OF_INDICES = re.compile(r"indices|\bLong\b|\bInt\b|\bint64\b")
"""What they say where an input should hold indices."""

HIGHER_ORDER = ("cond", "while_loop")
"""Operators of torch that run functions: they compile these, and go on using the parts of a model that they first found there."""

WITHOUT_FUNCTIONS = "compute both branches and choose with torch.where, or give the part of the model that has none"


def kept_outputs(model: nn.Module, inputs: Inputs, *, silent: bool = False) -> dict[str, Tensor]:
    """What :func:`run` gives, by name, to be held beyond the model's next run, which may write to the same tensors again. If it
    draws numbers, these are the same at every run. ``silent``: print nothing, as a graph module does where it fails. Raises
    TraceError when it does not run."""
    with quiet() if silent else nullcontext():
        return {name: tensor.clone() for name, tensor in named_outputs(run(model, inputs)).items()}


@contextmanager
def eval_mode(*models: object) -> Iterator[None]:
    """Put modules in eval mode and give every submodule its own flag back afterwards; other objects are left alone."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    flags = [(module, module.training) for module in modules]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


def run(model: nn.Module, inputs: tuple[Tensor, ...], *, draw: int = 0) -> Any:
    """The model's output without gradients. If it draws numbers, they are the same at every run on the same inputs, or others for
    another ``draw``; so two models differ only by what they compute. Raises TraceError that names the input shapes when the
    model cannot run."""
    shapes = shapes_of(inputs)
    try:
        with torch.no_grad(), same_random_numbers(seed_of(inputs) + draw):
            return model(*(tensor.clone() for tensor in inputs))  # it may work on them in place
    except Exception as error:
        reason = first_line(error)
        raise TraceError(
            f"{type(model).__name__}: the model does not run on input {shapes}: {reason}; "
            f"{_advice(model, error, reason, inputs)}"
        ) from error


def higher_order(model: nn.Module) -> str | None:
    """The operator that runs functions, such as torch.cond, which the code of a forward of the model names; None if none does."""
    for module in model.modules():
        names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
        found = next((name for name in HIGHER_ORDER if name in names), None)
        if "torch" in names and found is not None:
            return f"torch.{found}"
    return None


def _advice(model: nn.Module, error: Exception, reason: str, inputs: Inputs) -> str:
    """What to do about an error, judging by its reason."""
    if "keyword-only argument" in reason:
        return wrapping(type(model).__name__)
    if "required positional argument" in reason:
        return "give every input of it (--input once for each, or a tuple as example_input in Python)"
    called = higher_order(model) if type(error).__module__.startswith("torch._dynamo") else None
    if called is not None:
        return f"it calls {called}, which runs functions of its own: {WITHOUT_FUNCTIONS}"
    if isinstance(error, ModuleNotFoundError):
        # The folder of FILE.py:NAME is searched while that file is imported, and not any more when a forward runs.
        return "install what its forward imports, or put the folder of that into PYTHONPATH"
    if _OF_DEVICES.search(reason):
        return "give inputs that lie where its weights do, and let its forward make tensors there, as x.new_zeros(...)"
    if not about_types(reason):
        return "give the shape it expects (--input, or example_input in Python)"
    cast = _cast(model, inputs, reason)
    if cast is None:
        return (
            "its inputs have the type of its weights, but its forward makes numbers of another type: make them there in that of "
            "the input, as torch.arange(n, dtype=x.dtype), or give the model, and its inputs, in float32, as model.float()"
        )
    found = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in inputs)
    return (
        f"give numbers of the type it expects, which {found} is not, as {cast} (example_input in Python, or an "
        "example, --input FILE.py:NAME)"
    )


def _cast(model: nn.Module, inputs: Inputs, reason: str) -> str | None:
    """What makes numbers of the type that the model probably expects: that of its weights, or indices where they have that and
    the error speaks of these. None where no other input would help."""
    own = next((parameter.dtype for parameter in parameters_of(model) if parameter.is_floating_point()), torch.float32)
    real = [tensor.dtype for tensor in inputs if tensor.is_floating_point()]
    if not real or any(dtype != own for dtype in real):
        return f"x.to({own})"
    return "x.long()" if _OF_INDICES.search(reason) else None
