"""Grouped: a k x k convolution in g groups to g*r channels, then a pointwise that mixes them.

Each group of input channels gets r filters of its own; ``W[:, group]`` as an ``O x (C/g k^2)`` matrix is factorised to
rank r. Peng et al. 2018; Liebenwein et al. 2021 (ALDS) choose g and r by the error of all layers.
"""

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.structures.algebra import low_rank
from convrewrite.structures.structure import Setting, Stage


class Grouped:
    """See the module's text; ``groups`` is g, ``rank`` is r, the filters of each group."""

    name = "grouped"
    reference = "Peng et al. 2018"

    def reject(self, spec: ConvSpec) -> str | None:
        if not self.variants(spec):
            return f"the input channels ({spec.in_channels}) do not divide into 2, 4, 8 or more groups of at least two"
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        powers = (2**i for i in range(1, spec.in_channels.bit_length()))
        return tuple({"groups": g} for g in powers if spec.in_channels % g == 0 and g < spec.in_channels)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        kh, kw = spec.kernel_size
        return min(spec.out_channels, spec.in_channels // int(variant["groups"]) * kh * kw)

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        groups, rank = int(setting["groups"]), int(setting["rank"])
        inner = groups * rank
        return (Stage(spec.in_channels, inner, "hw", groups=groups), Stage(inner, spec.out_channels))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        groups, rank = int(setting["groups"]), int(setting["rank"])
        outputs, inputs, kh, kw = kernel.shape
        matrices = kernel.reshape(outputs, groups, -1).transpose(0, 1)  # (g, O, C/g k^2)
        mixing, filters = low_rank(matrices, rank)
        return (
            filters.reshape(groups * rank, inputs // groups, kh, kw),
            mixing.transpose(0, 1).reshape(outputs, groups * rank, 1, 1),
        )


STRUCTURE = Grouped()
