"""Tucker: a pointwise from C to R1, a k x k from R1 to R2, a pointwise from R2 to O.

Tucker-2 of the kernel over its two channel modes, by higher-order orthogonal iteration. Kim et al. 2016; but with many channels
each half-sweep is one step of subspace iteration from the current vectors, which never loses energy, instead of a whole
eigendecomposition. One ``rank`` t sets both: R1 and R2 are the same share ``t / max(C, O)`` of C and of O.
"""

import torch
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.structures.structure import Setting, Stage

SWEEPS = 10
"""Rounds in which the two bases are improved in turn."""

LARGE = 256
"""With more channels than this an eigendecomposition takes the longest of all steps."""


class Tucker:
    """See the module's text."""

    name = "tucker"
    reference = "Kim et al. 2016"

    def reject(self, spec: ConvSpec) -> str | None:
        if spec.kernel_size == (1, 1):
            return "for a 1x1 kernel the structure 'channel' is the same with one stage less"
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return ({},)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        return max(spec.in_channels, spec.out_channels)

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        inner, outer = _ranks(spec, int(setting["rank"]))
        return (Stage(spec.in_channels, inner), Stage(inner, outer, "hw"), Stage(outer, spec.out_channels))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        inner, outer = _ranks(spec, int(setting["rank"]))
        v = _leading(kernel.transpose(0, 1).flatten(1), inner)
        u = _leading(torch.einsum("ochw,cr->orhw", kernel, v).flatten(1), outer)
        exact = (inner, outer) == (spec.in_channels, spec.out_channels)
        for _ in range(0 if exact else SWEEPS):
            v = _towards_leading(torch.einsum("ochw,or->crhw", kernel, u).flatten(1), v)
            u = _towards_leading(torch.einsum("ochw,cr->orhw", kernel, v).flatten(1), u)
        core = torch.einsum("ochw,or,cs->rshw", kernel, u, v)
        return v.T[:, :, None, None], core, u[:, :, None, None]


def _ranks(spec: ConvSpec, rank: int) -> tuple[int, int]:
    top = max(spec.in_channels, spec.out_channels)
    return -(-rank * spec.in_channels // top), -(-rank * spec.out_channels // top)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors, completed to orthonormal columns where the matrix has fewer."""
    # Of few inputs and thousands of outputs, the square of all outputs would take minutes.
    if len(matrix) > matrix.shape[1]:
        return torch.linalg.svd(matrix)[0][:, :rank]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return vectors[:, values.argsort(descending=True)[:rank]]


def _towards_leading(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The leading left singular vectors; for large matrices orthonormal columns that are nearer to them than the given ones."""
    if len(matrix) <= LARGE:
        return _leading(matrix, vectors.shape[1])
    turned, _ = torch.linalg.qr(matrix @ (matrix.T @ vectors))
    return turned


STRUCTURE = Tucker()
