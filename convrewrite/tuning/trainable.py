"""Which parameters of a rewritten model are trained, the block in which only they are, and the layout of its kernels."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from convrewrite.errors import UsageError
from convrewrite.layers import attention_parameters
from convrewrite.modules import eval_mode
from convrewrite.state import named_parameters_of, parameters_of

Module = TypeVar("Module", bound=nn.Module)


def rewritten_parameters(model: nn.Module, sites: Sequence[str]) -> dict[str, nn.Parameter]:
    """The stage kernels and biases of the modules at ``sites``, under the model's own names, in the model's order. The attention
    of a dynamic convolution is not among them: it is the original's.

    Raises UsageError for a site that the model does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in sites if name not in modules]
    if missing:
        raise UsageError(f"{missing[0]}: expected a rewritten site of the model, found no module of this name")
    wanted = {id(parameter) for name in sites for parameter in parameters_of(modules[name])}
    wanted -= {id(parameter) for name in sites for parameter in attention_parameters(modules[name])}
    return {name: parameter for name, parameter in _numbers(model) if id(parameter) in wanted}


def every_parameter(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of the model that can be trained, under its own names, in its order."""
    return dict(_numbers(model))


def _numbers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in named_parameters_of(model) if p.is_floating_point())


@contextmanager
def training(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the block gradients reach only ``parameters``, and every module is in eval mode: a BatchNorm uses its running
    statistics, and nothing is dropped out. Afterwards everything is as it was, gradients included."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters_of(model)]
    chosen = {id(parameter) for parameter in parameters.values()}
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        with eval_mode(model), torch.enable_grad():
            yield
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


def numbers_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of what the parameters hold."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def at_least_single(tensor: Tensor) -> torch.dtype:
    """The tensor's type of numbers, or single precision where that is more."""
    return torch.promote_types(tensor.dtype, torch.float32)


def put_numbers(parameters: Mapping[str, nn.Parameter], numbers: Mapping[str, Tensor]) -> None:
    """Let the parameters hold what :func:`numbers_of` returned."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(numbers[name])


def laid_out(model: Module, layout: torch.memory_format) -> Module:
    """The model itself, with its four-dimensional tensors in this layout. Kernels of volumes, and those that a dynamic
    convolution mixes, stay as they are; torch's ``to`` would refuse the model because of them."""
    for tensor in (*parameters_of(model), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    return model
