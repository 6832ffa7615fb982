"""Small convolutional networks from descriptions that can be drawn and read: every kind of layer, joined in every way."""

from dataclasses import dataclass
from typing import Any

import torch
from networks import settled
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.layers.dynamic import DynamicConv2d

SIDE = 2
"""Channels that a side branch adds where branches are concatenated."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution, or a pair, with what surrounds it.

    ``padding`` is a padding mode, with as much of it as keeps the size at stride 1, or "same" or "none". ``call``: a "module",
    a module called "twice", two modules with one Parameter ("tied"), a function on a "parameter" or "buffer", the same
    "parameter" twice, or a kernel computed "from input". ``way``: "plain", or joined with the layer's input by "skip",
    "skip in place", "reversed skip", "gate in place", "divide in place", "exchange" of channels, with a "projection" of it,
    or by "concat". ``relu`` says where there is one and in which
    form. Where the input's mean is not above ``fork`` the layer is passed over.
    """

    kind: str = "standard"
    outputs: int = 4
    kernel: int = 3
    stride: int = 1
    padding: str = "zeros"
    groups: int = 1
    bias: bool = True
    norm: bool = False
    relu: str = ""
    call: str = "module"
    way: str = "plain"
    fork: float | None = None

    @property
    def dilation(self) -> int:
        """Of both axes."""
        return 2 if self.kind == "dilated" else 1

    @property
    def margin(self) -> int:
        """Padding on every side, unless it is "same"."""
        return 0 if self.padding in ("none", "same") else self.dilation * (self.kernel - 1) // 2

    @property
    def calls(self) -> int:
        """How often its convolution is called, one call after another."""
        return 2 if self.call in ("twice", "tied", "parameter twice") else 1

    def after(self, size: int) -> int:
        """The width of the output for an input of this width."""
        span = self.dilation * (self.kernel - 1)
        for _ in range(self.calls):
            if self.kind == "transposed":
                size = (size - 1) * self.stride - 2 * self.margin + span + self.stride
            elif self.padding != "same":
                size = (size + 2 * self.margin - span - 1) // self.stride + 1
        return size


@dataclass(frozen=True, slots=True)
class Network:
    """A network of ``layers`` on inputs ``(N, 3, size, size)``, or ``(N, 3, size)`` of one dimension.

    ``returns``: a "tensor", class "scores", or a "tuple" or "dict" of the scores and what the first layer gives.
    ``branching``: the forward asks a number that it computes for its way, so that no graph can follow it as a whole.
    """

    layers: tuple[Layer, ...]
    dims: int = 2
    size: int = 10
    returns: str = "tensor"
    branching: bool = False
    double: bool = True
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return torch.float64 if self.double else torch.float32

    def inputs(self, count: int, seed: int = 1) -> Tensor:
        """Smooth inputs with channels that differ in mean."""
        generator = torch.Generator().manual_seed(seed)
        shape = (count, 3, *[self.size + 2] * self.dims)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        pool = F.avg_pool2d if self.dims == 2 else F.avg_pool1d
        return (pool(noise, 3, 1) * 2 + 0.3 * torch.randn(count, 3, *[1] * self.dims, generator=generator)).to(
            self.dtype
        )

    def build(self, seed: int | None = None) -> nn.Module:
        """The network in eval mode, with weights drawn from its seed or another."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed if seed is None else seed)
            return settled(Drawn(self).to(self.dtype))


class Drawn(nn.Module):
    """The network of a description."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net
        parts, channels = [], 3
        for layer in net.layers:
            parts.append(Part(layer, channels, net.dims))
            channels = parts[-1].outputs
        self.parts = nn.ModuleList(parts)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Any:
        taps = []
        for part in self.parts:
            x = part(x)
            taps.append(x)
        if self.net.branching and float(x.detach().abs().sum()) < 0:
            x = -x
        if self.net.returns == "tensor":
            return x
        scores = self.head(x.flatten(2).mean(2))
        if self.net.returns == "scores":
            return scores
        return (scores, taps[0]) if self.net.returns == "tuple" else {"scores": scores, "tap": taps[0]}


class Part(nn.Module):
    """One layer of a description, on so many input channels."""

    def __init__(self, layer: Layer, inputs: int, dims: int) -> None:
        super().__init__()
        self.layer = layer
        self.outputs = layer.outputs + (SIDE if layer.way == "concat" else 0)
        self.conv = _conv(layer, inputs, dims)
        if layer.call == "tied":
            self.second = _conv(layer, inputs, dims)
            self.second.weight = self.conv.weight
        self.norm: nn.Module | None = _norm(layer.outputs, dims) if layer.norm else None
        side = {"concat": SIDE, "projection": layer.outputs}.get(layer.way)
        self.side = None if side is None else _module(Layer("pointwise", side, 1), inputs, dims)
        self.relu = nn.ReLU(inplace="in place" in layer.relu)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.fork is not None and not float(x.detach().mean()) > self.layer.fork:
            return x
        if self.layer.relu in ("before", "in place before"):
            x = self.relu(x)
        y = self.conv(x)
        if self.layer.calls == 2:
            y = (self.second if self.layer.call == "tied" else self.conv)(torch.tanh(y))
        y = y if self.norm is None else self.norm(y)
        y = self._join(x, y)
        if self.layer.relu == "in place on a view":
            y[:, :2].relu_()
        if self.layer.relu == "function":
            return F.relu(y)
        return self.relu(y) if self.layer.relu in ("module", "in place") else y

    def _join(self, x: Tensor, y: Tensor) -> Tensor:
        match self.layer.way:
            case "skip":
                return y + x
            case "reversed skip":
                return torch.add(x, y)
            case "skip in place":
                y += x
                return y
            case "gate in place":
                x *= torch.sigmoid(y)
                return x
            case "divide in place":
                x /= 1 + torch.sigmoid(y)
                return x
            case "exchange":
                return torch.cat([y[:, :1], x[:, 1:]], 1)
            case "projection" if self.side is not None:
                return y + self.side(x)
            case "concat" if self.side is not None:
                return torch.cat([y, self.side(x)], 1)
            case _:
                return y


class Functional(nn.Module):
    """A convolution called as a function, on tensors of its own or on a kernel that it computes from its input."""

    weight: Tensor | None

    def __init__(self, layer: Layer, module: nn.Module) -> None:
        super().__init__()
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d)
        self.layer = layer
        self.transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
        self.dims, self.groups = module.weight.dim() - 2, module.groups
        self.shape = tuple(module.weight.shape)
        weight, bias = module.weight.detach().clone(), None if module.bias is None else module.bias.detach().clone()
        if layer.call == "from input":
            self.register_parameter("weight", None)
            self.to_kernel = nn.Linear(module.in_channels, weight.numel())
        elif layer.call == "buffer":
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        layer, margin = self.layer, self.layer.margin
        kernel = self._computed(x) if self.weight is None else self.weight
        if self.transposed:
            transpose = F.conv_transpose1d if self.dims == 1 else F.conv_transpose2d
            extra = layer.stride - 1
            return transpose(x, kernel, self.bias, layer.stride, margin, extra, self.groups, layer.dilation)
        padding: int | str = "same" if layer.padding == "same" else margin
        if layer.padding in ("reflect", "replicate", "circular"):
            x = F.pad(x, self._margins(margin), mode=layer.padding)
            padding = 0
        elif layer.kind == "asymmetric" and padding != "same":
            x = F.pad(x, self._margins(margin))
            padding = 0
        convolve = F.conv1d if self.dims == 1 else F.conv2d
        return convolve(x, kernel, self.bias, layer.stride, padding, layer.dilation, self.groups)

    def _margins(self, margin: int) -> list[int]:
        rows = 0 if self.layer.kind == "asymmetric" else margin
        return [margin] * 2 if self.dims == 1 else [margin, margin, rows, rows]

    def _computed(self, x: Tensor) -> Tensor:
        return self.to_kernel(x.flatten(2).mean((0, 2))).reshape(self.shape)


def _conv(layer: Layer, inputs: int, dims: int) -> Any:
    if layer.kind == "separable":
        depthwise = Layer("depthwise", inputs, layer.kernel, layer.stride, layer.padding)
        norm = [_norm(inputs, dims)] if layer.norm else []
        pointwise = Layer("pointwise", layer.outputs, 1, bias=layer.bias)
        return nn.Sequential(_module(depthwise, inputs, dims), *norm, _module(pointwise, inputs, dims))
    module = _module(layer, inputs, dims)
    return (
        Functional(layer, module) if layer.call in ("parameter", "parameter twice", "buffer", "from input") else module
    )


def _module(layer: Layer, inputs: int, dims: int) -> nn.Module:
    groups = inputs if layer.kind == "depthwise" else layer.groups
    kernel: Any = layer.kernel
    margin: Any = "same" if layer.padding == "same" else layer.margin
    if layer.kind == "asymmetric" and dims == 2:
        kernel, margin = (1, layer.kernel), margin if margin == "same" else (0, margin)
    if layer.kind == "transposed":
        transposed = nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose2d
        extra = layer.stride - 1
        return transposed(inputs, layer.outputs, kernel, layer.stride, margin, extra, groups, layer.bias)
    mode: Any = layer.padding if layer.padding in ("reflect", "replicate", "circular") else "zeros"
    if layer.kind == "dynamic":
        return DynamicConv2d(
            inputs, layer.outputs, kernel, layer.stride, margin, layer.dilation, groups, layer.bias, mode,
            kernels=2, temperature=1.0,
        )  # fmt: skip
    convolution = nn.Conv1d if dims == 1 else nn.Conv2d
    return convolution(inputs, layer.outputs, kernel, layer.stride, margin, layer.dilation, groups, layer.bias, mode)


def _norm(channels: int, dims: int) -> nn.Module:
    return nn.BatchNorm1d(channels) if dims == 1 else nn.BatchNorm2d(channels)
