"""Depthwise-separable: a depthwise k x k with multiplier r and a pointwise, in either order.

Depthwise-first, each input channel gets r spatial filters: ``W[:, c] = P[:, c] D[c]``, the rank-r factorisation of an
``O x k^2`` matrix for every c. Pointwise-first, each output channel sums r filtered mixtures: ``W[o] = D[o]^T A[o]``,
``C x k^2`` for every o. Guo et al. 2018 (network decoupling), where r terms are r separate depthwise-separable blocks.
"""

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.structures.algebra import low_rank
from convrewrite.structures.structure import Setting, Stage

DEPTHWISE_FIRST = "depthwise-first"
POINTWISE_FIRST = "pointwise-first"


class Separable:
    """See the module's text; ``rank`` is the multiplier r."""

    name = "separable"
    reference = "Guo et al. 2018"
    orders = (DEPTHWISE_FIRST, POINTWISE_FIRST)

    def reject(self, spec: ConvSpec) -> str | None:
        if spec.kernel_size == (1, 1):
            return "a 1x1 kernel has no spatial extent to separate"
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return tuple({"order": order} for order in self.orders)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        channels = spec.out_channels if variant["order"] == DEPTHWISE_FIRST else spec.in_channels
        return min(channels, spec.kernel_size[0] * spec.kernel_size[1])

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        inputs, outputs, rank = spec.in_channels, spec.out_channels, int(setting["rank"])
        if setting["order"] == DEPTHWISE_FIRST:
            return (Stage(inputs, inputs * rank, "hw", groups=inputs), Stage(inputs * rank, outputs))
        return (Stage(inputs, outputs * rank), Stage(outputs * rank, outputs, "hw", groups=outputs))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        rank = int(setting["rank"])
        outputs, inputs, kh, kw = kernel.shape
        if setting["order"] == DEPTHWISE_FIRST:
            mixing, spatial = low_rank(kernel.permute(1, 0, 2, 3).flatten(2), rank)  # (C, O, r), (C, r, k^2)
            pointwise = mixing.permute(1, 0, 2).reshape(outputs, inputs * rank, 1, 1)
            return spatial.reshape(inputs * rank, 1, kh, kw), pointwise
        mixing, spatial = low_rank(kernel.flatten(2), rank)  # (O, C, r), (O, r, k^2)
        pointwise = mixing.transpose(1, 2).reshape(outputs * rank, inputs, 1, 1)
        return pointwise, spatial.reshape(outputs, rank, kh, kw)


STRUCTURE = Separable()
