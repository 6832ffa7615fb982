"""What one run of a model shows of its convolutions: modules and functional calls, their places, sizes and tensors.

Running works for any control flow, which following a graph does not.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convrewrite.conv import CONV_TYPES, Conv, ConvSpec, Size
from convrewrite.functional_calls import ARGUMENTS, geometry_of_call, named_arguments
from convrewrite.layers.dynamic import DynamicConv2d
from convrewrite.tracing import run
from convrewrite.volumetric import VOLUME_TYPES, Volume

SITE_TYPES = (*CONV_TYPES, DynamicConv2d)
"""Modules that are convolutions; a subclass of one may have a forward of its own."""


@dataclass(slots=True)
class Call:
    """All calls of one convolution in one run; of a functional one (``module`` None) with the tensors it was given.

    ``owner`` is the module itself, or the innermost one whose forward makes the functional call; ``given`` has, per call,
    the names of the arguments that forward was given.
    """

    owner: str
    module: nn.Module | None
    spec: ConvSpec
    sizes: list[Size] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)
    given: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Observation:
    """One run: convolutions by name, a functional one being ``module#index``; how often each module ran, by its id; and by
    the id of each parameter and buffer the modules whose forward used it for anything but a functional convolution."""

    calls: dict[str, Call]
    runs: Counter[int]
    users: dict[int, set[str]]


@dataclass(slots=True)
class _Frame:
    """A module that is running, and how many functional convolutions its forward has called so far."""

    module: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    functional: int = 0

    @property
    def convolves(self) -> bool:
        """Whether this is a plain convolution module, whose forward is known."""
        return type(self.module) in (*SITE_TYPES, *VOLUME_TYPES)


def spec_of(module: Conv | DynamicConv2d) -> ConvSpec:
    """The geometry of a convolution module; that of a dynamic one has its kernels stacked."""
    return module.stacked_spec if isinstance(module, DynamicConv2d) else ConvSpec.of(module)


def observe(model: nn.Module, inputs: tuple[Tensor, ...]) -> Observation:
    """Run the model once. Raises TraceError when it does not run on ``inputs``."""
    watch = _Watch(model, inputs[0].shape[0])
    with watch.hooks(), watch:
        run(model, inputs)
    return Observation(watch.calls, watch.runs, watch.users)


class _Watch(TorchFunctionMode):
    """Sees modules through hooks and functions as a torch function mode."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self._model = model
        self._batch = batch
        self._names = {id(module): name for name, module in model.named_modules()}
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._stack: list[_Frame] = []
        self.calls: dict[str, Call] = {}
        self.runs: Counter[int] = Counter()
        self.users: dict[int, set[str]] = defaultdict(set)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks, and nothing in it can be replaced
                continue
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._names[id(module)]
        self._stack.append(_Frame(module, name, args, kwargs))
        self.runs[id(module)] += 1
        if isinstance(module, (*SITE_TYPES, *VOLUME_TYPES)):
            x = args[0] if args else next(iter(kwargs.values()))
            geometry = Volume.of(module) if isinstance(module, VOLUME_TYPES) else spec_of(module)
            self._note(name, name, module, geometry, x)

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = self._stack[-1] if self._stack else _Frame(self._model, "", (), {})
        if func in ARGUMENTS and not frame.convolves:
            self._convolved(frame, named_arguments(func, args, kwargs or {}))
        elif not _reads_only_its_shape(func):
            self._used(frame, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _convolved(self, frame: _Frame, named: dict[str, Any]) -> None:
        self._used(frame, named["input"])
        geometry = geometry_of_call(named)
        spec = geometry.spec() if isinstance(geometry, Volume) else geometry
        name = f"{frame.name}#{frame.functional}"
        while name in self.calls and self.calls[name].spec != spec:  # another way through the same forward
            frame.functional += 1
            name = f"{frame.name}#{frame.functional}"
        frame.functional += 1
        call = self._note(name, frame.name, None, geometry, named["input"])
        call.weights.append(named["weight"])
        call.biases.append(named.get("bias"))
        call.given.append(_names_given(frame))

    def _note(self, name: str, owner: str, module: nn.Module | None, geometry: ConvSpec | Volume, x: Tensor) -> Call:
        if isinstance(geometry, Volume):
            spec: ConvSpec = geometry.spec()
            axes, size = 3, geometry.input_size(x.shape)
        else:
            spec, axes = geometry, geometry.dims
            size = (int(x.shape[-2]) if axes == 2 else 1, int(x.shape[-1]))
        entry = self.calls.setdefault(name, Call(owner, module, spec))
        entry.sizes += [size] * max(1, (x.shape[0] if x.dim() == axes + 2 else 1) // self._batch)
        return entry

    def _used(self, frame: _Frame, values: Any) -> None:
        """Note every parameter and buffer among the arguments of a function."""
        if isinstance(values, Tensor):
            if id(values) in self._own:
                self.users[id(values)].add(frame.name)
        elif isinstance(values, tuple | list):
            for value in values:
                self._used(frame, value)
        elif isinstance(values, dict):
            self._used(frame, tuple(values.values()))


def _reads_only_its_shape(func: Any) -> bool:
    """Whether a function asks a tensor for nothing but what it is, as ``weight.shape`` and ``weight.size()`` do."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in (
        "shape",
        "size",
        "dim",
        "ndim",
        "ndimension",
        "dtype",
        "device",
        "numel",
        "is_floating_point",
        "__len__",
    )


def _names_given(frame: _Frame) -> tuple[str, ...]:
    """The parameters of a running forward that its caller gave a value."""
    return tuple(inspect.signature(frame.module.forward).bind(*frame.args, **frame.kwargs).arguments)
