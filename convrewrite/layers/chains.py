"""A chain of convolutions without anything between: what separable, asymmetric and grouped layers are.

The geometry of each stage follows from the structure of the same name by the axis rule of
:mod:`convrewrite.structures.lowering`, so a layer and a rewritten site compute the same. Only the last stage has the bias.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from convrewrite.conv import ConvSpec, Cost, Size
from convrewrite.layers.geometry import Device, checked_size
from convrewrite.layers.single import stage_conv
from convrewrite.structures import Setting, Structure, stage_specs


class ConvChain(nn.Module):
    """``(N, in_channels, H, W)`` -> what its stages, convolutions without anything between, make of it in order."""

    __jit_unused_properties__: ClassVar = ["stages"]
    in_channels: int
    out_channels: int

    def __init__(self, stages: Mapping[str, ConvSpec], device: Device, dtype: torch.dtype | None) -> None:
        """One submodule per stage, under its name."""
        super().__init__()
        for name, spec in stages.items():
            self.add_module(name, stage_conv(spec, device, dtype))
        specs = list(stages.values())
        self.in_channels, self.out_channels = specs[0].in_channels, specs[-1].out_channels

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The stages, first to last: convolutions, unless other modules have been put in their places."""
        return tuple(self.children())

    def _convolutions(self) -> tuple[nn.Conv2d, ...]:
        """The stages; raises TypeError once another module stands in the place of one.

        It is no property: TorchScript reads those of any module, also where it does not use them.
        """
        found: list[nn.Conv2d] = []
        for name, stage in self.named_children():
            if not isinstance(stage, nn.Conv2d):
                raise TypeError(f"{type(self).__name__}: {name}: expected an nn.Conv2d, found {type(stage).__name__}")
            found.append(stage)
        return tuple(found)

    def forward(self, x: Tensor) -> Tensor:
        """The stages in order, whatever modules have been put in their places."""
        for stage in self.children():
            x = stage(x)
        return x

    def cost(self, input_size: Size) -> Cost:
        """Parameters, and MACs for one example of this height and width; raises ValueError for one too small."""
        total = Cost()
        for stage in self._convolutions():
            spec = ConvSpec.of(stage)
            size = checked_size(type(self).__name__, spec, input_size)
            total += spec.cost([size])
            input_size = spec.output_size(size)
        return total

    def set_numbers(self, kernels: Sequence[Tensor], bias: Tensor | None) -> None:
        """Copy stage kernels, first to last, and the last stage's bias."""
        with torch.no_grad():
            stages = self._convolutions()
            for stage, kernel in zip(stages, kernels, strict=True):
                stage.weight.copy_(kernel)
            last = stages[-1]
            if bias is not None and last.bias is not None:
                last.bias.copy_(bias)


def named_stages(names: Sequence[str], structure: Structure, spec: ConvSpec, setting: Setting) -> dict[str, ConvSpec]:
    """The geometry of a structure's stages, by the names of the submodules they become."""
    return dict(zip(names, stage_specs(spec, structure.stages(spec.per_group, setting)), strict=True))


def require_order(owner: str, order: str, *known: str) -> None:
    """Raise ValueError for an order that is not among ``known``."""
    if order not in known:
        raise ValueError(f"{owner}: order: expected {' or '.join(map(repr, known))}, found {order!r}")
