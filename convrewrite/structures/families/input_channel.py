"""Input-channel: a pointwise from C to R < C channels, then the k x k convolution from these to O. The mirror of ``channel``.

The kernel as a ``C x O k^2`` matrix is factorised to rank R: Tucker-1 over the input channels, as in Kim et al. 2016 for
layers where only one side is reduced. Its last stage is dense, so the fit to inputs only searches for the pointwise.
"""

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.structures.algebra import low_rank
from convrewrite.structures.structure import Setting, Stage


class InputChannel:
    """See the module's text; ``rank`` is R."""

    name = "input-channel"
    reference = "Kim et al. 2016, one side"

    def reject(self, spec: ConvSpec) -> str | None:
        if spec.kernel_size == (1, 1):
            return "for a 1x1 kernel the structure 'channel' is the same"
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return ({},)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        kh, kw = spec.kernel_size
        return min(spec.in_channels, spec.out_channels * kh * kw)

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        rank = int(setting["rank"])
        return (Stage(spec.in_channels, rank), Stage(rank, spec.out_channels, "hw"))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        rank = int(setting["rank"])
        outputs, inputs, kh, kw = kernel.shape
        mixing, filters = low_rank(kernel.transpose(0, 1).reshape(inputs, -1), rank)
        pointwise = mixing.T.reshape(rank, inputs, 1, 1)
        return pointwise, filters.reshape(rank, outputs, kh, kw).transpose(0, 1).contiguous()


STRUCTURE = InputChannel()
