"""Dynamic convolution: every example has a kernel of its own, a mixture of K that its content chooses.

Chen et al. 2020, "Dynamic Convolution: Attention over Convolution Kernels": ``W(x) = sum_k a_k(x) W_k`` with ``a(x)``
the softmax of a small network on the channels' means. A batch is one convolution in ``batch * groups`` groups.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.conv import PADDING_MODES, ConvSpec, Cost, PaddingMode, Size
from convrewrite.layers.geometry import (
    Device,
    Padding,
    Pair,
    checked_size,
    checked_spec,
    geometry_of,
    require_conv2d,
    require_count,
    reversed_margins,
)

TEMPERATURE = 30.0
"""The temperature with which training begins in the paper."""


class KernelAttention(nn.Module):
    """``(N, C, H, W)`` -> ``(N, kernels)``, rows that sum to one: pool, linear, ReLU, linear, softmax(./temperature).

    The temperature is a buffer, so that it is saved with the weights it belongs to.
    """

    temperature: Tensor
    started_at = TEMPERATURE

    def __init__(
        self, channels: int, hidden: int, kernels: int, temperature: float, device: Device, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.score = nn.Linear(hidden, kernels, device=device, dtype=dtype)
        self.register_buffer("temperature", torch.tensor(temperature, device=device, dtype=self.score.weight.dtype))
        self.started_at = temperature

    def reset_parameters(self) -> None:
        """Set the temperature that was asked for: in a layer made on the device "meta", ``to_empty`` leaves arbitrary memory."""
        self.temperature.fill_(self.started_at)

    def forward(self, x: Tensor) -> Tensor:
        """The shares of the kernels for every example."""
        scores = self.score(F.relu(self.squeeze(x.mean((2, 3)))))
        return torch.softmax(scores / self.temperature, dim=1)

    def extra_repr(self) -> str:
        """The temperature, where there is a number to show."""
        return "" if self.temperature.is_meta else f"temperature={float(self.temperature):g}"


class DynamicConv2d(nn.Module):
    """``(N, C, H, W)`` -> ``(N, O, H', W')``, with the kernel ``sum_k attention(x)[k] * weight[k]`` for the example x; or one
    example ``(C, H, W)`` -> ``(O, H', W')``, as ``nn.Conv2d`` has it.

    ``weight`` is ``(kernels, O, C / groups, kh, kw)``, ``bias`` ``(kernels, O)`` or None. When exported or jit-traced, the batch
    must stay open, which a number of groups cannot: then it multiplies patches instead, with the same result.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Padding = "same",
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        kernels: int = 4,
        temperature: float = TEMPERATURE,
        reduction: int = 4,
    ) -> None:
        """The attention's hidden layer has ``in_channels / reduction`` units.

        A high ``temperature`` makes the mixture even, which is best for the start of training; the paper goes from 30 down to 1
        in ten epochs: ``layer.attention.temperature.fill_(value)``. Raises ValueError.
        """
        super().__init__()
        owner = type(self).__name__
        spec = checked_spec(
            owner, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        require_count(owner, "kernels", kernels)
        require_count(owner, "reduction", reduction)
        if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
            raise ValueError(f"{owner}: temperature: expected a finite number above 0, found {temperature!r}")
        self.in_channels, self.out_channels, self.kernels = in_channels, out_channels, kernels
        self.kernel_size, self.stride, self.dilation, self.groups = spec.kernel_size, spec.stride, spec.dilation, groups
        self.padding, self.padding_mode = spec.padding, padding_mode
        hidden = max(1, in_channels // reduction)
        self.attention = KernelAttention(in_channels, hidden, kernels, temperature, device, dtype)
        self.weight = nn.Parameter(torch.empty(kernels, *spec.kernel_shape, device=device, dtype=dtype))
        numbers = torch.empty(kernels, out_channels, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(numbers) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each kernel and its bias as ``nn.Conv2d`` starts them."""
        bound = 1 / math.sqrt(self.weight[0, 0].numel())
        for numbers in (self.weight, self.bias):
            if numbers is not None:
                nn.init.uniform_(numbers, -bound, bound)

    @property
    def spec(self) -> ConvSpec:
        """The geometry of the convolution that each example goes through."""
        return ConvSpec(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode,
        )  # fmt: skip

    @property
    def stacked_spec(self) -> ConvSpec:
        """The geometry of all kernels as one static convolution, whose outputs this layer mixes."""
        spec = self.spec
        (top, bottom), (left, right) = spec.padding_pairs()
        even = top == bottom and left == right
        return replace(
            spec,
            out_channels=self.out_channels * self.kernels,
            padding=(top, left) if even else spec.padding,
            kernels=self.kernels,
        )

    def stacked_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient ``(N, O, H', W')`` at the output for the input ``x`` -> that at the outputs of all kernels, stacked."""
        each = torch.einsum("nk,nohw->nkohw", self.attention(x), gradient)
        return stack(each.transpose(0, 1).transpose(1, 2), self.groups).transpose(0, 1)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        kernels: int = 4,
        temperature: float = TEMPERATURE,
        reduction: int = 4,
        noise: float = 0.0,
        seed: int = 0,
    ) -> Self:
        """All kernels equal to that of a trained convolution, so that the output is the same for any attention.

        Equal kernels get equal gradients up to their share of attention, and give the attention none at all. For training,
        ``noise`` makes them differ: it is a share of the kernel's standard deviation, and is drawn from ``seed``.
        """
        source = require_conv2d(cls.__name__, conv)
        if not (isinstance(noise, int | float) and 0 <= noise < math.inf):
            raise ValueError(f"{cls.__name__}: noise: expected a finite number from 0, found {noise!r}")
        layer = cls(**geometry_of(source), kernels=kernels, temperature=temperature, reduction=reduction)
        with torch.no_grad():
            layer.weight.copy_(source.weight.expand_as(layer.weight))
            if layer.bias is not None and source.bias is not None:
                layer.bias.copy_(source.bias.expand_as(layer.bias))
            if noise > 0:
                generator = torch.Generator("cpu").manual_seed(seed)
                spread = noise * source.weight.std(correction=0)
                drawn = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
                layer.weight.add_(spread * drawn.to(layer.weight))
        return layer.train(source.training)

    def cost(self, input_size: Size) -> Cost:
        """Parameters, and MACs for one example: attention, mixing of kernels and biases, one convolution."""
        hidden = self.attention.squeeze.out_features
        attention = self.in_channels * hidden + hidden * self.kernels
        mixed = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        parameters = mixed + attention + hidden + self.kernels
        size = checked_size(type(self).__name__, self.spec, input_size)
        return Cost(parameters, attention + mixed + self.spec.macs(size))

    def kernels_for(self, x: Tensor) -> Tensor:
        """The kernels ``(N, O, C / groups, kh, kw)`` that the examples of a batch are convolved with."""
        return torch.einsum("nk,kochw->nochw", self.attention(x), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Every example with its own kernel."""
        margins, batch = reversed_margins(self.spec), as_batch(x)
        shares = self.attention(batch)
        if any(margins):
            batch = F.pad(batch, margins, mode=PADDING_MODES[self.padding_mode])
        mixed = convolve_mixture(batch, shares, self.weight, self.bias, self.stride, self.dilation, self.groups)
        return as_given(mixed, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's, through which a whole model is moved to another memory layout."""
        moved: Self = super()._apply(of_each_kernel(fn), recurse)  # type: ignore[no-untyped-call]
        return moved

    def extra_repr(self) -> str:
        """The geometry and the number of kernels."""
        return f"{self.spec.describe()}, kernels={self.kernels}, bias={self.bias is not None}"


def of_each_kernel(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of the tensors of a module, which takes K stacked kernels as one with more outputs: memory layouts are those of
    images, and refuse five axes."""
    return lambda tensor: fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2]) if tensor.dim() == 5 else fn(tensor)


def as_batch(x: Tensor) -> Tensor:
    """One example as a batch of one. For torch.fx it is one node, as it depends on the number of axes."""
    return x.unsqueeze(0) if x.dim() == 3 else x


def as_given(outputs: Tensor, x: Tensor) -> Tensor:
    """The outputs of a batch without its axis, where the input ``x`` had none."""
    return outputs.squeeze(0) if x.dim() == 3 else outputs


torch.fx.wrap("as_batch")
torch.fx.wrap("as_given")


def stack(numbers: Tensor, groups: int) -> Tensor:
    """``(K, O, ...)`` of K kernels -> ``(K * O, ...)``, all kernels of a group side by side."""
    return numbers.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)


def unstack(numbers: Tensor, kernels: int, groups: int) -> Tensor:
    """The inverse of :func:`stack`."""
    return numbers.unflatten(0, (groups, kernels, -1)).transpose(0, 1).flatten(1, 2)


def convolve_mixture(
    x: Tensor, shares: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, dilation: Size, groups: int
) -> Tensor:
    """Each example of ``x (N, C, H, W)``, unpadded, with its mixture of the K kernels by ``shares (N, K)``.

    For torch.fx it is one node: which of two ways it takes is decided when it runs, by whether the batch must stay open.
    """
    if _batch_stays_open() or x.shape[0] == 0:
        return _multiply_patches(x, shares, weight, bias, stride, dilation, groups)
    return _convolve_groups(x, shares, weight, bias, stride, dilation, groups)


torch.fx.wrap("convolve_mixture")


def _batch_stays_open() -> bool:
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or bool(tracing)


def _convolve_groups(
    x: Tensor, shares: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, dilation: Size, groups: int
) -> Tensor:
    """One kernel per example, and one convolution in which no example shares a group with another."""
    batch = x.shape[0]
    kernels = torch.einsum("nk,kochw->nochw", shares, weight).flatten(0, 1)
    offsets = None if bias is None else (shares @ bias).flatten()
    mixed = F.conv2d(x.flatten(0, 1)[None], kernels, offsets, stride, 0, dilation, batch * groups)
    output: Tensor = mixed.unflatten(1, (batch, -1)).squeeze(0)
    return output


def _multiply_patches(
    x: Tensor, shares: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, dilation: Size, groups: int
) -> Tensor:
    """The same as one matrix product per example and group, for which the batch is an axis like any other."""
    kh, kw = weight.shape[-2:]
    height = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    rows, columns = (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1
    shifted = [
        x[:, :, top : top + rows : stride[0], left : left + columns : stride[1]]
        for top in range(0, kh * dilation[0], dilation[0])
        for left in range(0, kw * dilation[1], dilation[1])
    ]
    # Patches are (N, g, C/g * kh * kw, H' * W'), kernels (N, g, O/g, C/g * kh * kw).
    patches = torch.stack(shifted, dim=2).unflatten(1, (groups, -1)).flatten(2, 3).flatten(3)
    kernels = (shares @ weight.flatten(1)).unflatten(1, (groups, weight.shape[1] // groups, -1))
    mixed: Tensor = (kernels @ patches).flatten(1, 2).unflatten(2, (height, width))
    return mixed if bias is None else mixed + (shares @ bias)[:, :, None, None]
