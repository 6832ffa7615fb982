"""Kernels that are computed at every call, though not from the input: weight and spectral norm, standardised weights.

In eval mode a module that does nothing else is a plain convolution with the computed kernel. Running it shows whether that is so:
it must convolve exactly once, with its very input, return the result, and use the same kernel whatever the input.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from convrewrite.conv import Conv, ConvSpec
from convrewrite.graph.calls import ARGUMENTS, geometry_of_call, named_arguments
from convrewrite.inputs import Inputs, varied
from convrewrite.modules import hooked, run
from convrewrite.state import parameters_of

NORMS = (WeightNorm, SpectralNorm)
"""Hooks that compute a weight before every call, as torch had them before it had parametrisations."""


def is_normed(module: nn.Module) -> bool:
    """Whether such a hook, and no other one, computes a weight of this module before its calls."""
    hooks = module._forward_pre_hooks.values()
    return bool(hooks) and all(isinstance(hook, NORMS) for hook in hooks) and not module._forward_hooks


def fixed_convolutions(model: nn.Module, names: Collection[str], inputs: Inputs) -> dict[str, ConvSpec]:
    """The named modules that are plain convolutions with a kernel that they compute -> their geometry."""
    given = _inputs_of(model, names, inputs)
    found: dict[str, ConvSpec] = {}
    for name, x in given.items():
        module = model.get_submodule(name)
        made = (_tried(module, value) for value in _variants(x))
        first = next(made)
        if first is not None and all(other is not None and _equal(first, other) for other in made):
            found[name] = ConvSpec.of(first)
    return found


def _variants(x: Tensor) -> Iterator[Tensor]:
    """The input, and variants in all that a kernel could depend on: its numbers, their scale, the batch size, its extents."""
    yield x
    yield from varied((x,))
    yield x * 1000 + 1000
    yield x * -0.001
    yield torch.cat([x, x, x])
    yield x[:1]
    yield torch.cat([x, x], -1)
    if x.dim() > 3:
        yield torch.cat([x, x, x], -2)


def _tried(module: nn.Module, x: Tensor) -> Conv | None:
    try:
        return _only_convolution(module, x)
    except Exception:  # a module may refuse an input in any way
        return None


def fixed_convolution(module: nn.Module, spec: ConvSpec) -> Conv:
    """The plain convolution of this geometry that a module amounts to. Raises ValueError where it is none."""
    like = next(tensor for tensor in (*parameters_of(module), *module.buffers()) if tensor.is_floating_point())
    extents = spec.extents[-spec.dims :]
    conv = _only_convolution(module, like.new_zeros(1, spec.in_channels, *extents))
    if conv is None or ConvSpec.of(conv) != spec:
        raise ValueError(f"it is no {spec.describe()}")
    trained = any(parameter.requires_grad for parameter in parameters_of(module))
    return conv.train(module.training).requires_grad_(trained)


def _inputs_of(model: nn.Module, names: Collection[str], inputs: Inputs) -> Mapping[str, Tensor]:
    """The first input of each named module that is given one tensor at every call, and nothing else."""
    calls: dict[str, list[Any]] = {name: [] for name in names}
    with hooked(
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, kwargs, seen=seen: seen.append((*args, *kwargs.values())), with_kwargs=True
        )
        for name, seen in calls.items()
    ):
        run(model, inputs)
    alone = {name: seen for name, seen in calls.items() if seen and all(len(args) == 1 for args in seen)}
    return {name: seen[0][0] for name, seen in alone.items() if isinstance(seen[0][0], Tensor)}


class _Convolutions(TorchFunctionMode):
    """Notes every convolution: its arguments by name, and what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ARGUMENTS:
            self.calls.append((named_arguments(func, args, kwargs or {}), result))
        return result


def _only_convolution(module: nn.Module, x: Tensor) -> Conv | None:
    """The convolution that is all a module does to ``x``, with copies of its kernel and bias; None if it does anything else."""
    with torch.no_grad(), _Convolutions() as seen:
        output = module(x)
    if len(seen.calls) != 1:
        return None
    named, result = seen.calls[0]
    spec = geometry_of_call(named)
    if named["input"] is not x or output is not result or not isinstance(spec, ConvSpec):
        return None
    conv = spec.build(device="meta")
    for name in ("weight", "bias"):
        if named.get(name) is not None:
            setattr(conv, name, nn.Parameter(named[name].detach().clone()))
    return conv


def _equal(a: Conv, b: Conv) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return ConvSpec.of(a) == ConvSpec.of(b) and all(torch.equal(first[name], second[name]) for name in first)
