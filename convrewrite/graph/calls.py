"""What one run of a model shows of its convolutions: modules and functional calls, their places, geometry, sizes and tensors.

The geometry of a functional call is read from its arguments by their names; other stages, which find the same calls in graphs,
use the same tables.
"""

import inspect
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from convrewrite.conv import CONV_TYPES, Conv, ConvSpec, Size, as_size
from convrewrite.graph.volumes import VOLUME_TYPES, Volume
from convrewrite.layers import DynamicConv2d
from convrewrite.modules import hooked, run
from convrewrite.state import parameters_of

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ANY = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_aten = torch.ops.aten

ARGUMENTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    **dict.fromkeys((_aten.conv1d, _aten.conv1d.default, _aten.conv1d.padding), _CONV),
    **dict.fromkeys((_aten.conv2d, _aten.conv2d.default, _aten.conv2d.padding), _CONV),
    **dict.fromkeys((_aten.conv3d, _aten.conv3d.default, _aten.conv3d.padding), _CONV),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED),
    **dict.fromkeys((_aten.conv_transpose1d, _aten.conv_transpose1d.default), _TRANSPOSED),
    **dict.fromkeys((_aten.conv_transpose2d, _aten.conv_transpose2d.input), _TRANSPOSED),
    **dict.fromkeys((_aten.conv_transpose3d, _aten.conv_transpose3d.input), _TRANSPOSED),
    **dict.fromkeys((torch.convolution, _aten.convolution, _aten.convolution.default), _ANY),
}
"""Functions that convolve -> the names of their arguments in order. Those of ``torch.nn.functional`` are the same objects."""

MORE_THAN_INPUT = "it is called with more than its input, as with an output_size, which a replacement would not take"
"""Why a convolution that is called so stays."""

UNBATCHED = "it is called with inputs that have no axis for the examples, as in a loop over these or under torch.vmap"
"""Why a convolution that is called so stays."""

TRANSFORMED = (
    "it is called by a function that torch transforms, as under torch.func.jvp, where numbers of others come in"
)
"""Why a convolution that is called so stays: torch may use other weights there, and multiplies more than the convolution
itself does."""

OTHER_WEIGHTS = (
    "it is called with other weights than its own, as by torch.func.functional_call, which a replacement would not take"
)
"""Why a convolution that is called so stays."""

GEOMETRY = ("stride", "padding", "dilation", "transposed", "output_padding")
"""Arguments that must be constants for a call to be a module. The number of groups follows from the channels."""

SITE_TYPES = (*CONV_TYPES, DynamicConv2d)
"""Modules that are convolutions; a subclass of one may have a forward of its own."""


@dataclass(slots=True)
class Call:
    """All calls of one convolution in one run; for a functional one (``module`` is None) with the tensors it was given.

    ``sizes`` are those of the inputs for one of the model's examples; ``all_sizes`` those for all of its examples together, which
    alone are true where the calls are not ``even``, with as many inputs for each example. ``owner`` is the module itself, or the
    innermost one whose forward makes the functional call; ``given`` has, per call, the names of the arguments that forward was
    given.
    """

    owner: str
    module: nn.Module | None
    spec: ConvSpec
    sizes: list[Size] = field(default_factory=list)
    all_sizes: list[Size] = field(default_factory=list)
    even: bool = True
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)
    given: list[tuple[str, ...]] = field(default_factory=list)
    refusal: str | None = None
    """Why it cannot be replaced, judging by what it was given at any of its calls."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One run: convolutions by name, a functional one being ``module#index``; how often each module ran, by its id; and for each
    parameter and buffer, by its id, the modules whose forward used it for anything but a functional convolution."""

    calls: dict[str, Call]
    runs: Counter[int]
    users: dict[int, set[str]]


def observe(model: nn.Module, inputs: tuple[Tensor, ...]) -> Observation:
    """Run the model once. Raises TraceError when it does not run on ``inputs``."""
    observer = _Observer(model, inputs[0].shape[0])
    with hooked(observer.handles()), observer:
        run(model, inputs)
    return Observation(observer.calls, observer.runs, observer.users)


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


class _Observer(TorchFunctionMode):
    """Sees modules through hooks and functions as a torch function mode."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self._model = model
        self._batch = batch
        self._names = {id(module): name for name, module in model.named_modules()}
        self._own = {id(tensor) for tensor in (*parameters_of(model), *model.buffers())}
        self._stack: list[_Frame] = []
        self.calls: dict[str, Call] = {}
        self.runs: Counter[int] = Counter()
        self.users: dict[int, set[str]] = defaultdict(set)

    def handles(self) -> Iterator[RemovableHandle]:
        """Registers hooks on every module that takes any, once in every table of them: copy.copy makes modules that share one."""
        tables: set[int] = set()
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks, and nothing in it can be replaced
                continue
            if id(module._forward_pre_hooks) in tables:
                continue
            tables.add(id(module._forward_pre_hooks))
            yield module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
            yield module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._names[id(module)]
        self._stack.append(_Frame(module, name, args, kwargs))
        self.runs[id(module)] += 1
        if isinstance(module, (*SITE_TYPES, *VOLUME_TYPES)):
            geometry = Volume.of(module) if isinstance(module, VOLUME_TYPES) else spec_of(module)
            entry = self._note(name, name, module, geometry, _convolved_input(geometry, (args, kwargs)))
            if len(args) + len(kwargs) > 1 and type(module) in (*SITE_TYPES, *VOLUME_TYPES):
                entry.refusal = entry.refusal or MORE_THAN_INPUT
            if any(id(own) not in self._own for own in module._parameters.values() if own is not None):
                entry.refusal = entry.refusal or OTHER_WEIGHTS

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
        while name in self.calls and self.calls[name].spec != spec:  # another path through the same forward
            frame.functional += 1
            name = f"{frame.name}#{frame.functional}"
        frame.functional += 1
        call = self._note(name, frame.name, None, geometry, named["input"])
        call.weights.append(named["weight"])
        call.biases.append(named.get("bias"))
        call.given.append(_names_given(frame))

    def _note(
        self, name: str, owner: str, module: nn.Module | None, geometry: ConvSpec | Volume, x: Tensor | None
    ) -> Call:
        """A call on ``x``; None: on nothing that a convolution takes, so that it has no size."""
        spec = geometry.spec() if isinstance(geometry, Volume) else geometry
        entry = self.calls.setdefault(name, Call(owner, module, spec))
        if x is None:
            return entry
        if isinstance(geometry, Volume):
            axes, size = 3, geometry.input_size(x.shape)
        else:
            axes = geometry.dims
            size = (int(x.shape[-2]) if axes == 2 else 1, int(x.shape[-1]))
        entry.refusal = entry.refusal or self._odd(x, axes)
        count = x.shape[0] if x.dim() == axes + 2 else 1
        if torch._C._functorch.is_batchedtensor(x):  # whose examples are in an axis that it does not show
            count *= self._batch
        entry.sizes += [size] * max(1, count // self._batch)
        entry.all_sizes += [size] * count
        entry.even &= count > 0 and count % self._batch == 0
        return entry

    def _odd(self, x: Tensor, axes: int) -> str | None:
        """Why the input of a convolution is no batch with the same number of entries for each of the model's examples."""
        if x.dim() != axes + 2 or torch._C._functorch.is_batchedtensor(x):
            return UNBATCHED
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return TRANSFORMED
        if len(x) == 0 or len(x) % self._batch:
            advice = "of one" if len(x) else "that gets there"
            return (
                f"it is called with a batch of {len(x)} where the model is given {self._batch}, so that it has no cost of one "
                f"example; give an example input {advice}"
            )
        return None

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


def _convolved_input(geometry: ConvSpec | Volume, given: Any) -> Tensor | None:
    """The tensor, among what a module is given, that it can convolve: a subclass of a convolution may take others before it, or
    none. One with an axis for the examples comes first."""
    axes = 3 if isinstance(geometry, Volume) else geometry.dims
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return next((tensor for count in (axes + 2, axes + 1) for tensor in tensors if tensor.dim() == count), None)


def _reads_only_its_shape(func: Any) -> bool:
    """Whether a function asks a tensor only for its shape, dtype or device, as ``weight.shape`` and ``weight.size()`` do."""
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


def named_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of one of ``ARGUMENTS``, by name."""
    named = dict(zip(ARGUMENTS[function], args, strict=False)) | dict(kwargs)
    if "transposed" not in named:
        named["transposed"] = ARGUMENTS[function] is _TRANSPOSED
    return named


def geometry_of_call(named: Mapping[str, Any]) -> ConvSpec | Volume:
    """The geometry of a call; a kernel per example counts its examples as groups, as the call itself does."""
    weight, groups, transposed = named["weight"], int(named.get("groups", 1)), bool(named["transposed"])
    first, second, *extents = (int(n) for n in weight.shape)
    outputs, inputs = (second * groups, first) if transposed else (first, second * groups)
    axes, padding = len(extents), named.get("padding", 0)

    def numbers(name: str, default: int) -> list[int]:
        value = named.get(name, default)
        try:
            values = [operator.index(value)]  # a number of numpy, too
        except TypeError:
            values = [int(n) for n in value]
        return values * axes if len(values) == 1 else values

    around = padding if isinstance(padding, str) else numbers("padding", 0)
    bias = named.get("bias") is not None
    if axes == 3:
        stride, dilation = numbers("stride", 1), numbers("dilation", 1)
        return Volume(inputs, outputs, extents, stride, around, dilation, groups, bias, transposed)
    return ConvSpec(
        inputs, outputs, as_size(extents, 1), as_size(numbers("stride", 1), 1),
        around if isinstance(around, str) else as_size(around, 0), as_size(numbers("dilation", 1), 1), groups, bias,
        "zeros", transposed, as_size(numbers("output_padding", 0), 0), dims=axes,
    )  # fmt: skip


def spec_of(module: Conv | DynamicConv2d) -> ConvSpec:
    """The geometry of a convolution module; that of a dynamic one has its kernels stacked."""
    return module.stacked_spec if isinstance(module, DynamicConv2d) else ConvSpec.of(module)
