"""Asymmetric: a kh x 1 convolution to R channels and a 1 x kw from these, in either order.

The kernel as a ``(C kh) x (O kw)`` matrix has a rank-R factorisation, whose factors are the two convolutions: scheme 2 of
Jaderberg et al. 2014. The order matters for the cost when the stride or the two extents differ.
"""

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.structures.algebra import low_rank
from convrewrite.structures.structure import Setting, Stage

VERTICAL_FIRST = "vertical-first"
HORIZONTAL_FIRST = "horizontal-first"


class Asymmetric:
    """See the module's text; ``rank`` is R, the channels between the two."""

    name = "asymmetric"
    reference = "Jaderberg et al. 2014, scheme 2"
    orders = (VERTICAL_FIRST, HORIZONTAL_FIRST)

    def reject(self, spec: ConvSpec) -> str | None:
        if 1 in spec.kernel_size:
            return "the kernel has no second axis to split off"
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return tuple({"order": order} for order in self.orders)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        kh, kw = spec.kernel_size
        first, last = (kh, kw) if variant["order"] == VERTICAL_FIRST else (kw, kh)
        return min(spec.in_channels * first, spec.out_channels * last)

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        rank = int(setting["rank"])
        first, last = ("h", "w") if setting["order"] == VERTICAL_FIRST else ("w", "h")
        return (Stage(spec.in_channels, rank, first), Stage(rank, spec.out_channels, last))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        if setting["order"] == HORIZONTAL_FIRST:
            first, last = _factors(kernel.transpose(2, 3), int(setting["rank"]))
            return first.transpose(2, 3), last.transpose(2, 3)
        return _factors(kernel, int(setting["rank"]))


def _factors(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Vertical ``(R, C, kh, 1)`` and horizontal ``(O, R, 1, kw)`` factors of a kernel ``(O, C, kh, kw)``."""
    outputs, inputs, kh, kw = kernel.shape
    matrix = kernel.permute(1, 2, 0, 3).reshape(inputs * kh, outputs * kw)
    vertical, horizontal = low_rank(matrix, rank)
    return vertical.T.reshape(rank, inputs, kh, 1), horizontal.reshape(rank, outputs, 1, kw).transpose(0, 1)


STRUCTURE = Asymmetric()
