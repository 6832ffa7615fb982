"""Asymmetric convolution: a kh x 1 and a 1 x kw (Jaderberg et al. 2014)."""

from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from convrewrite.conv import ConvSpec, PaddingMode
from convrewrite.layers.chains import ConvChain, named_stages, require_order
from convrewrite.layers.fitted import FitInputs, replacement, require_rank, require_structure
from convrewrite.layers.geometry import Device, Padding, Pair, checked_spec, geometry_of, require_conv2d, require_count
from convrewrite.structures import ASYMMETRIC, Setting

VERTICAL_FIRST, HORIZONTAL_FIRST = ASYMMETRIC.orders


class AsymmetricConv2d(ConvChain):
    """A kh x 1 convolution to ``rank`` channels and a 1 x kw from these, in either order.

    They are the submodules ``vertical`` and ``horizontal``.
    """

    if TYPE_CHECKING:  # TorchScript would take them for interfaces
        vertical: nn.Conv2d
        horizontal: nn.Conv2d

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
        rank: int | None = None,
        order: str = VERTICAL_FIRST,
    ) -> None:
        """``rank`` channels in each group stand between the two; by default as many as halve the MACs.

        Raises ValueError for a kernel with an extent of 1.
        """
        owner = type(self).__name__
        require_order(owner, order, VERTICAL_FIRST, HORIZONTAL_FIRST)
        spec = checked_spec(
            owner, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        require_structure(owner, ASYMMETRIC, spec)
        rank = _rank_of_half_the_macs(spec, order) if rank is None else rank
        require_count(owner, "rank", rank)
        names = ("vertical", "horizontal") if order == VERTICAL_FIRST else ("horizontal", "vertical")
        setting: Setting = {"order": order, "rank": rank}
        super().__init__(named_stages(names, ASYMMETRIC, spec, setting), device, dtype)
        self.rank, self.order = rank, order

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        rank: int | None = None,
        order: str = VERTICAL_FIRST,
        inputs: FitInputs | None = None,
    ) -> Self:
        """The replacement of a trained convolution, fitted to its outputs where its real ``inputs`` are given.

        Exact at rank ``min(C kh, O kw)`` vertical-first, C and O being the channels of one group. Raises ValueError for
        a rank beyond, or a kernel with an extent of 1.
        """
        source = require_conv2d(cls.__name__, conv)
        layer = cls(**geometry_of(source), rank=rank, order=order)
        setting: Setting = {"order": order, "rank": layer.rank}
        require_rank(cls.__name__, "rank", ASYMMETRIC, ConvSpec.of(source), setting)
        layer.set_numbers(*replacement(cls.__name__, ASYMMETRIC, source, setting, inputs))
        return layer.train(source.training)

    def extra_repr(self) -> str:
        """The channels of the whole and the settings of its stages, which are listed below."""
        return f"{self.in_channels}, {self.out_channels}, rank={self.rank}, order={self.order!r}"


def _rank_of_half_the_macs(spec: ConvSpec, order: str) -> int:
    """By the MACs of one output position; the first stage is at full resolution along the axis it does not stride."""
    kh, kw = spec.kernel_size
    first, last, finer = (kh, kw, spec.stride[1]) if order == VERTICAL_FIRST else (kw, kh, spec.stride[0])
    inputs, outputs = spec.per_group.in_channels, spec.per_group.out_channels
    half = inputs * outputs * kh * kw / 2
    rank = round(half / (inputs * first * finer + outputs * last))
    return max(1, min(rank, ASYMMETRIC.full_rank(spec.per_group, {"order": order})))
