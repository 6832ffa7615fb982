"""Depthwise-separable convolution (Guo et al. 2018; Chollet 2017; Howard et al. 2017)."""

from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from convrewrite.conv import ConvSpec, PaddingMode
from convrewrite.layers.chains import ConvChain, named_stages, require_order
from convrewrite.layers.fitted import FitInputs, replacement, require_rank, require_structure
from convrewrite.layers.geometry import Device, Padding, Pair, checked_spec, geometry_of, require_conv2d, require_count
from convrewrite.structures import SEPARABLE, Setting

DEPTHWISE_FIRST, POINTWISE_FIRST = SEPARABLE.orders


class SeparableConv2d(ConvChain):
    """A depthwise k x k and a pointwise, in either order: ``depthwise`` and ``pointwise``.

    ``multiplier`` is the number of spatial filters per input channel (depthwise-first) or per output channel
    (pointwise-first). Any convolution can be written as one of these with ``multiplier = kernel area`` at most.
    """

    if TYPE_CHECKING:  # TorchScript would take them for interfaces
        depthwise: nn.Conv2d
        pointwise: nn.Conv2d

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
        multiplier: int = 1,
        order: str = DEPTHWISE_FIRST,
    ) -> None:
        """``groups`` splits the whole into independent parts. Raises ValueError for a 1 x 1 kernel."""
        owner = type(self).__name__
        require_order(owner, order, DEPTHWISE_FIRST, POINTWISE_FIRST)
        require_count(owner, "multiplier", multiplier)
        spec = checked_spec(
            owner, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        require_structure(owner, SEPARABLE, spec)
        names = ("depthwise", "pointwise") if order == DEPTHWISE_FIRST else ("pointwise", "depthwise")
        setting: Setting = {"order": order, "rank": multiplier}
        super().__init__(named_stages(names, SEPARABLE, spec, setting), device, dtype)
        self.multiplier, self.order = multiplier, order

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        multiplier: int = 1,
        order: str = DEPTHWISE_FIRST,
        inputs: FitInputs | None = None,
    ) -> Self:
        """The replacement of a trained convolution, fitted to its outputs where its real ``inputs`` are given.

        Exact at a multiplier of ``min(kernel area, channels)``. Raises ValueError for one beyond, or a 1 x 1 kernel.
        """
        source = require_conv2d(cls.__name__, conv)
        layer = cls(**geometry_of(source), multiplier=multiplier, order=order)
        setting: Setting = {"order": order, "rank": multiplier}
        require_rank(cls.__name__, "multiplier", SEPARABLE, ConvSpec.of(source), setting)
        layer.set_numbers(*replacement(cls.__name__, SEPARABLE, source, setting, inputs))
        return layer.train(source.training)

    def extra_repr(self) -> str:
        """The channels of the whole and the settings of its stages, which are listed below."""
        return f"{self.in_channels}, {self.out_channels}, multiplier={self.multiplier}, order={self.order!r}"
