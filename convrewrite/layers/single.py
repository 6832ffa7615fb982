"""The kinds that are one ``nn.Conv2d``: standard, pointwise, dilated and depthwise.

They *are* ``nn.Conv2d``, with the same state-dict keys; each checks that it is of its kind, and ``padding="same"``
works for every stride and every kernel.
"""

from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.conv import ConvSpec, Cost, PaddingMode, Size
from convrewrite.layers.geometry import (
    Device,
    Padding,
    Pair,
    checked_size,
    checked_spec,
    geometry_of,
    require_conv2d,
    reversed_margins,
)

Layer = TypeVar("Layer", bound=nn.Conv2d)


class SingleConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose ``padding="same"`` gives ``ceil(size / stride)`` for every stride, kernel and padding mode.

    "same" adds ``dilation * (kernel_size - 1)`` pixels to an axis, the odd one at its end, as ``nn.Conv2d`` does at
    stride 1. Where both sides get the same number, ``padding`` holds it afterwards, otherwise "same".
    """

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
    ) -> None:
        """As ``nn.Conv2d``; raises ValueError for arguments that are not of the layer's kind."""
        spec = checked_spec(
            type(self).__name__, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode,
        )  # fmt: skip
        self.require_kind(spec)
        left, right, top, bottom = margins = reversed_margins(spec)
        symmetric = left == right and top == bottom
        super().__init__(
            in_channels, out_channels, spec.kernel_size, spec.stride, (top, left) if symmetric else 0, spec.dilation,
            groups, bias, padding_mode, device, dtype,
        )  # fmt: skip
        if not symmetric:
            self.padding = "same"
            self._reversed_padding_repeated_twice = margins

    @classmethod
    def require_kind(cls, spec: ConvSpec) -> None:
        """Raise ValueError, naming the layer to use, if this geometry is not of the layer's kind."""

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """A copy of a convolution of this kind, its numbers included. Raises ValueError for another kind."""
        source = require_conv2d(cls.__name__, conv)
        return _with_numbers_of(source, cls(**geometry_of(source)))

    def cost(self, input_size: Size) -> Cost:
        """Parameters, and MACs for one example of this height and width; raises ValueError for one too small."""
        spec = ConvSpec.of(self)
        return spec.cost([checked_size(type(self).__name__, spec, input_size)])

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As torch has it, and in words that TorchScript compiles.
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            return F.conv2d(padded, weight, bias, self.stride, (0, 0), self.dilation, self.groups)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class StandardConv2d(SingleConv2d):
    """Every output channel sees all input channels within a kernel: ungrouped, not dilated, larger than 1 x 1."""

    @classmethod
    def require_kind(cls, spec: ConvSpec) -> None:
        """Raise ValueError for another kind."""
        if spec.groups > 1:
            better = "DepthwiseConv2d" if spec.groups == spec.in_channels else "GroupedConv2d"
            raise ValueError(f"{cls.__name__}: groups: expected 1, found {spec.groups}; use {better}")
        if spec.kernel_size == (1, 1):
            raise ValueError(f"{cls.__name__}: kernel_size: expected more than 1x1; use PointwiseConv2d")
        if spec.is_dilated:
            raise ValueError(f"{cls.__name__}: dilation: expected 1, found {spec.dilation}; use DilatedConv2d")


class DilatedConv2d(SingleConv2d):
    """A kernel whose taps are ``dilation`` pixels apart: a wider view at the same cost."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Padding = "same",
        dilation: Pair = 2,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As ``nn.Conv2d``, with a dilation of 2 unless another is given. Raises ValueError if nothing is dilated."""
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )

    @classmethod
    def require_kind(cls, spec: ConvSpec) -> None:
        """Raise ValueError for another kind."""
        if not spec.is_dilated:
            raise ValueError(
                f"{cls.__name__}: dilation: expected more than 1 along a kernel axis longer than 1, found dilation "
                f"{spec.dilation} with kernel_size {spec.kernel_size}; use StandardConv2d"
            )


class DepthwiseConv2d(SingleConv2d):
    """Each input channel is filtered by itself, to ``out_channels / in_channels`` outputs; channels are not mixed."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Padding = "same",
        dilation: Pair = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``out_channels`` is a multiple of ``in_channels``; ``groups`` is ``in_channels``, which need not be said.

        Raises ValueError for any other groups.
        """
        groups = in_channels if groups is None else groups
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )

    @classmethod
    def require_kind(cls, spec: ConvSpec) -> None:
        """Raise ValueError for another kind."""
        if spec.groups != spec.in_channels:
            better = "GroupedConv2d" if spec.groups > 1 else "SeparableConv2d"
            raise ValueError(
                f"{cls.__name__}: groups: expected in_channels={spec.in_channels}, found {spec.groups}; use {better}"
            )


class PointwiseConv2d(SingleConv2d):
    """A 1 x 1 convolution: mixes channels, looks at no neighbours."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Pair = 1,
        padding: Padding = "same",
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As the other layers, without ``kernel_size`` and ``dilation``, which a single tap has no use for."""
        super().__init__(in_channels, out_channels, 1, stride, padding, 1, groups, bias, padding_mode, device, dtype)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """A copy of a 1 x 1 convolution, its numbers included. Raises ValueError for any other kernel size."""
        source = require_conv2d(cls.__name__, conv)
        g = geometry_of(source)
        if g["kernel_size"] != (1, 1):
            found = g["kernel_size"]
            raise ValueError(f"{cls.__name__}: kernel_size: expected (1, 1), found {found}; use the layer of its kind")
        copy = cls(
            g["in_channels"], g["out_channels"], g["stride"], g["padding"], g["groups"], g["bias"], g["padding_mode"],
            g["device"], g["dtype"],
        )  # fmt: skip
        return _with_numbers_of(source, copy)


def stage_conv(spec: ConvSpec, device: Device, dtype: torch.dtype | None) -> nn.Conv2d:
    """A stage of a chain: an ``nn.Conv2d``, or a :class:`SingleConv2d` where that cannot pad as needed."""
    left, right, top, bottom = reversed_margins(spec)
    plain = left == right and top == bottom
    build = nn.Conv2d if plain else SingleConv2d
    return build(
        spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, (top, left) if plain else "same",
        spec.dilation, spec.groups, spec.bias, spec.padding_mode, device, dtype,
    )  # fmt: skip


def _with_numbers_of(conv: nn.Conv2d, layer: Layer) -> Layer:
    with torch.no_grad():
        layer.weight.copy_(conv.weight)
        if conv.bias is not None and layer.bias is not None:
            layer.bias.copy_(conv.bias)
    return layer.train(conv.training)
