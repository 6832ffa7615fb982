"""The algebra of stage kernels: composing them, factorising a kernel into them, splitting and joining groups."""

from collections.abc import Sequence

import torch
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.structures.structure import Setting, Stage, Structure


def compose(kernels: Sequence[Tensor], stages: Sequence[Stage]) -> Tensor:
    """The kernel ``(O, C, kh, kw)`` that a chain of stages amounts to, for an original without groups."""
    total = _dense(kernels[0], stages[0].groups)
    for kernel, stage in zip(kernels[1:], stages[1:], strict=True):
        groups = stage.groups
        before = total.unflatten(0, (groups, -1))
        after = kernel.unflatten(0, (groups, -1))
        # On each spatial axis one operand has extent one, so broadcasting it convolves the two kernels.
        total = torch.einsum("gomhw,gmchw->gochw", after, before).flatten(0, 1)
    return total


def composed_kernel(kernels: Sequence[Tensor], stages: Sequence[Stage], groups: int) -> Tensor:
    """The canonical kernel that the stages of a site amount to, all groups of the original joined."""
    per_group = zip(*(stage.chunk(groups) for stage in kernels), strict=True)
    return torch.cat([compose(parts, stages) for parts in per_group])


def _dense(kernel: Tensor, groups: int) -> Tensor:
    """A grouped kernel with its zeros written out."""
    if groups == 1:
        return kernel
    per_group = kernel.unflatten(0, (groups, -1))
    eye = torch.eye(groups, dtype=kernel.dtype, device=kernel.device)
    return torch.einsum("gochw,gk->gokchw", per_group, eye).flatten(2, 3).flatten(0, 1)


def through(stage: Stage, kernel: Tensor, patches: Tensor) -> Tensor:
    """One stage applied to patches side by side, ``(C, h, w, N)``, which have exactly the kernel's extent along the axes that the
    stage owns: ``(O, h', w', N)``. Each group is one product of matrices of numbers that lie next to each other in memory, so
    something large is copied only where a stage owns the last axis alone."""
    groups, (_, height, width, count) = stage.groups, patches.shape
    k, x = kernel.unflatten(0, (groups, -1)).flatten(2), patches.unflatten(0, (groups, -1))
    match stage.axes:
        case "hw":
            return torch.bmm(k, x.flatten(1, 3)).reshape(-1, 1, 1, count)
        case "h":
            return torch.bmm(k, x.flatten(1, 2).flatten(2)).reshape(-1, 1, width, count)
        case "w":
            return torch.bmm(k, x.transpose(2, 3).flatten(1, 2).flatten(2)).reshape(-1, height, 1, count)
        case _:
            return torch.bmm(k, x.flatten(2)).reshape(-1, height, width, count)


def low_rank(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrices of a rank as factors ``(..., n, rank)`` and ``(..., rank, m)``, which share the singular values
    evenly.

    The singular vectors of the shorter side come from the eigenvectors of its Gram matrix, which takes a tenth of the time of
    an SVD. They are orthonormal whatever the rounding, so at full rank the product is exact.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        left, right = low_rank(matrices.mT, rank)
        return right.mT, left.mT
    squares, vectors = torch.linalg.eigh(matrices.mT @ matrices)
    squares, vectors = squares.flip(-1)[..., :rank], vectors.flip(-1)[..., :rank]
    # Where a singular value is lost in rounding, any way to share it is as good: the factors must only be finite.
    least = squares[..., :1].clamp_min(0) * torch.finfo(squares.dtype).eps + torch.finfo(squares.dtype).tiny
    root = torch.maximum(squares, least) ** 0.25
    return matrices @ vectors / root[..., None, :], (vectors * root[..., None, :]).mT


def split_groups(kernel: Tensor, groups: int) -> tuple[Tensor, ...]:
    """A grouped canonical kernel -> the kernels of its groups."""
    return kernel.chunk(groups, dim=0)


def join_groups(per_group: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Stage kernels of every group -> the stage kernels of the grouped whole."""
    return tuple(torch.cat(stage, dim=0) for stage in zip(*per_group, strict=True))


def initial_kernels(structure: Structure, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
    """Weights-only stage kernels for a convolution with any number of groups."""
    parts = split_groups(kernel, spec.groups)
    return join_groups([structure.weights(part, spec.per_group, setting) for part in parts])
