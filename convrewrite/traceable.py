"""Functions that torch.fx cannot trace where a size of an input is among their numbers, and others for their places."""

import builtins
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

Function = Callable[..., Any]

CHOICES = {"max": torch.sym_max, "min": torch.sym_min}
"""Functions of Python -> those of torch that do the same with two numbers."""

SIZED = (
    (torch, ("zeros", "ones", "empty", "rand", "randn", "tensor", "as_tensor")),
    (Tensor, ("expand", "repeat", "tile", "view", "reshape")),
)
"""Functions and methods of torch that make nodes only of tensors, and of sizes that are given as one tuple."""


def traceable() -> Iterator[tuple[Any, str, Function]]:
    """Whose function, its name, and what does the same with traced values as well, of which it makes a node."""
    torch.overrides.get_overridable_functions()  # torch keeps a table of its functions, which has to have the original ones
    for name, symbolic in CHOICES.items():
        yield builtins, name, functools.partial(_chosen, getattr(builtins, name), symbolic)
    yield builtins, "len", functools.partial(_length, len)
    yield builtins, "isinstance", functools.partial(_is_instance, isinstance)
    for owner, names in SIZED:
        for name in names:
            yield owner, name, _of_sizes(getattr(owner, name))


def _chosen(original: Function, symbolic: Function, *args: Any, **kwargs: Any) -> Any:
    if len(args) > 1 and not kwargs and any(isinstance(value, fx.Proxy) for value in args):
        return functools.reduce(symbolic, args)
    return original(*args, **kwargs)


def _length(original: Function, value: Any) -> Any:
    """Python itself takes nothing but a number for a length, which would be that of the example. What a forward is given is
    mostly a tensor; whether other values are, which may as well be tuples, only a tracer that computes shapes knows."""
    if not issubclass(type(value), fx.Proxy):  # isinstance is replaced meanwhile, and all of Python asks for lengths
        return original(value)
    class_of = getattr(value.tracer, "class_of", None)
    if class_of is not None:
        return value.size(0) if issubclass(class_of(value), Tensor) else original(value)
    given = type(value).__len__ is fx.Proxy.__len__ and value.node.op == "placeholder"
    return value.size(0) if given else original(value)


def _is_instance(original: Function, value: Any, kinds: Any) -> bool:
    """A traced value is none of torch's tensors; what it stands for is known to a tracer that computes shapes. It cannot be told
    by a ``__class__`` of its own, which torch's compiled code believes as well."""
    if original(value, kinds):
        return True
    if not original(value, fx.Proxy) or not hasattr(value.tracer, "class_of"):
        return False
    return issubclass(value.tracer.class_of(value), kinds)


def _of_sizes(original: Function) -> Function:
    def call(*args: Any, **kwargs: Any) -> Any:
        traced: list[fx.Proxy] = []
        fx.node.map_aggregate(
            (args, kwargs), lambda value: traced.append(value) if isinstance(value, fx.Proxy) else None
        )
        return fx.Proxy.__torch_function__(original, (), args, kwargs) if traced else original(*args, **kwargs)

    return call
