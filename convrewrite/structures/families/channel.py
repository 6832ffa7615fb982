"""Channel: the k x k convolution to R < O channels, then a pointwise up to O. For 1 x 1 it is the low-rank pointwise.

The optimum on data is closed form, reduced-rank regression: ``W' = U U^T W`` with U the leading eigenvectors of the
output's covariance. Zhang et al. 2016 (TPAMI), the linear case.
"""

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.structures.algebra import low_rank
from convrewrite.structures.structure import Setting, Stage


class Channel:
    """See the module's text; ``rank`` is R."""

    name = "channel"
    reference = "Zhang et al. 2016"

    def reject(self, spec: ConvSpec) -> str | None:
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return ({},)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        kh, kw = spec.kernel_size
        return min(spec.out_channels, spec.in_channels * kh * kw)

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        rank = int(setting["rank"])
        return (Stage(spec.in_channels, rank, "hw"), Stage(rank, spec.out_channels))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        rank = int(setting["rank"])
        mixing, filters = low_rank(kernel.flatten(1), rank)
        return filters.reshape(rank, *kernel.shape[1:]), mixing[:, :, None, None]


STRUCTURE = Channel()
