"""Grouped convolution, by itself or with a pointwise that mixes the groups (Xie et al. 2017; Peng et al. 2018)."""

from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from convrewrite.conv import ConvSpec, PaddingMode
from convrewrite.layers.chains import ConvChain, named_stages
from convrewrite.layers.fitted import FitInputs, replacement, require_rank
from convrewrite.layers.geometry import (
    Device,
    Padding,
    Pair,
    checked_spec,
    geometry_of,
    require_conv2d,
    require_count,
    require_flag,
)
from convrewrite.structures import GROUPED, Setting

GROUPS = 4
"""Groups, unless others are given."""


class GroupedConv2d(ConvChain):
    """A k x k convolution in groups, ``grouped``, and with ``mix`` a ``pointwise`` that mixes the groups' outputs.

    Without mixing an output channel never sees the inputs of another group, so a chain of such layers falls apart into
    independent networks. With it, each group has ``rank`` filters and the pointwise makes ``out_channels`` of all.
    """

    if TYPE_CHECKING:  # TorchScript would take them for interfaces
        grouped: nn.Conv2d
        pointwise: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Padding = "same",
        dilation: Pair = 1,
        groups: int = GROUPS,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        mix: bool = False,
        rank: int | None = None,
    ) -> None:
        """``rank`` goes with ``mix`` alone; by default it is ``out_channels / groups``, rounded up.

        Raises ValueError unless there are two groups or more, of two input channels or more.
        """
        owner = type(self).__name__
        for name, number in (("out_channels", out_channels), ("groups", groups)):
            require_count(owner, name, number)
        require_flag(owner, "mix", mix)
        rank = _checked_rank(owner, mix, rank, -(-out_channels // groups))
        width = groups * rank if mix else out_channels
        spec = checked_spec(
            owner, in_channels, width, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        _require_groups(owner, spec)
        if mix:
            whole = replace(spec, out_channels=out_channels, groups=1)
            stages = named_stages(("grouped", "pointwise"), GROUPED, whole, {"groups": groups, "rank": rank})
        else:
            stages = {"grouped": spec}
        super().__init__(stages, device, dtype)
        self.groups, self.mix, self.rank = groups, mix, rank

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, groups: int | None = None, rank: int | None = None, inputs: FitInputs | None = None
    ) -> Self:
        """A copy of a grouped convolution; of an ungrouped one, its replacement with ``mix``.

        The replacement has 4 groups unless told otherwise, and is fitted to the convolution's outputs where its real
        ``inputs`` are given. It is exact at rank ``min(O, C / groups * kernel area)``, which the rank is at most unless
        given. Raises ValueError for a rank beyond, for a depthwise convolution, and for a grouped one with any argument
        that asks for a change.
        """
        source = require_conv2d(cls.__name__, conv)
        spec = ConvSpec.of(source)
        if spec.groups > 1:
            if groups not in (None, spec.groups) or rank is not None or inputs is not None:
                raise ValueError(
                    f"{cls.__name__}: a convolution in {spec.groups} groups is copied as it is; "
                    "groups, rank and inputs are for ungrouped ones"
                )
            layer = cls(**geometry_of(source))
            layer.set_numbers([source.weight], source.bias)
            return layer.train(source.training)
        geometry = geometry_of(source)
        geometry["groups"] = GROUPS if groups is None else groups
        layer = cls(**geometry, mix=True, rank=rank)
        most = GROUPED.full_rank(spec.per_group, {"groups": layer.groups})
        if rank is None and layer.rank > most:
            layer = cls(**geometry, mix=True, rank=most)
        setting: Setting = {"groups": layer.groups, "rank": layer.rank}
        require_rank(cls.__name__, "rank", GROUPED, spec, setting)
        layer.set_numbers(*replacement(cls.__name__, GROUPED, source, setting, inputs))
        return layer.train(source.training)

    def extra_repr(self) -> str:
        """The channels of the whole and the settings of its stages, which are listed below."""
        mixing = f", mix=True, rank={self.rank}" if self.mix else ""
        return f"{self.in_channels}, {self.out_channels}, groups={self.groups}{mixing}"


def _checked_rank(owner: str, mix: bool, rank: int | None, otherwise: int) -> int:
    if rank is None:
        return otherwise
    if not mix:
        raise ValueError(f"{owner}: rank: it is the filters per group before a mixing pointwise; give mix=True with it")
    require_count(owner, "rank", rank)
    return rank


def _require_groups(owner: str, spec: ConvSpec) -> None:
    if spec.groups == 1:
        raise ValueError(f"{owner}: groups: expected 2 or more, found 1; use StandardConv2d")
    if spec.groups == spec.in_channels:
        raise ValueError(
            f"{owner}: groups: expected less than in_channels={spec.in_channels}, found as many; "
            "use DepthwiseConv2d or SeparableConv2d"
        )
