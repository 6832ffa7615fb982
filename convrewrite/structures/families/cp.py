"""CP: a pointwise from C to R, a depthwise k x k, a pointwise from R to O.

The canonical polyadic decomposition of the kernel as a three-way ``O x C x k^2`` tensor, by alternating least squares from
the leading singular vectors of the O and C unfoldings, the columns balanced after each sweep. Lebedev et al. 2015 split
the two spatial axes as well; keeping them together costs little and converges.
"""

import torch
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.structures.algebra import low_rank
from convrewrite.structures.structure import Setting, Stage

SWEEPS = 40
"""Rounds of alternating least squares, each of which solves for every factor once."""

Factors = tuple[Tensor, Tensor, Tensor]
"""Factors ``(O, R)``, ``(C, R)`` and ``(k^2, R)``."""

FEWER = ((1 << 20, 6), (1 << 19, 12))
"""Kernels of at least this many numbers (first) get only this many sweeps (second): each sweep takes long there, most of the gain
comes first, and the fit to the inputs goes on from the result. For a 128 x 128 x 9 kernel at ranks 42, 128 and 256, 12 sweeps
leave errors of 0.347, 0.213 and 0.140, and 40 sweeps 0.336, 0.204 and 0.130."""


SINGLE = 1 << 17
"""For kernels of at least this many numbers, sweeps run in float32, in half the time: after 40 of them the error of a 256 x 256 x
9 kernel was the same to five digits, at ranks 64 and 256."""


class Cp:
    """See the module's text; ``rank`` is R."""

    name = "cp"
    reference = "Lebedev et al. 2015, both spatial axes together"

    def reject(self, spec: ConvSpec) -> str | None:
        if spec.kernel_size == (1, 1):
            return "for a 1x1 kernel the structure 'channel' is the same with one stage less"
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return ({},)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        outputs, inputs, area = spec.out_channels, spec.in_channels, spec.kernel_size[0] * spec.kernel_size[1]
        return min(inputs * area, outputs * area, outputs * inputs)

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        rank = int(setting["rank"])
        return (Stage(spec.in_channels, rank), Stage(rank, rank, "hw", groups=rank), Stage(rank, spec.out_channels))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        rank = int(setting["rank"])
        tensor = kernel.flatten(2)
        if rank >= self.full_rank(spec, setting):
            outputs, inputs, taps = _exact(tensor, rank)
        elif 1 in tensor.shape[:2]:
            outputs, inputs, taps = _of_a_matrix(tensor, rank)
        else:
            outputs, inputs, taps = _alternate(tensor, rank)
        depthwise = taps.T.reshape(rank, 1, *kernel.shape[2:])
        return inputs.T[:, :, None, None], depthwise, outputs[:, :, None, None]


def _exact(tensor: Tensor, rank: int) -> Factors:
    """The trivial decomposition: two modes run through their unit vectors, the third holds the numbers of the kernel."""
    shape = tensor.shape
    longest = max(range(3), key=lambda mode: shape[mode])
    first, second = (mode for mode in range(3) if mode != longest)
    grid = torch.cartesian_prod(torch.arange(shape[first]), torch.arange(shape[second]))[:rank]
    factors: dict[int, Tensor] = {}
    for mode, index in ((first, grid[:, 0]), (second, grid[:, 1])):
        factors[mode] = torch.eye(shape[mode], dtype=tensor.dtype, device=tensor.device)[:, index]
    factors[longest] = tensor.movedim(longest, 0).flatten(1)
    return factors[0], factors[1], factors[2]


def _of_a_matrix(tensor: Tensor, rank: int) -> Factors:
    """Of a kernel with a single input or output, as of an STFT over samples: the nearest one is known without a sweep."""
    mode = 0 if tensor.shape[0] == 1 else 1
    left, right = low_rank(tensor.squeeze(mode), rank)
    ones = tensor.new_ones(1, rank)
    return _balanced(ones, left, right.mT) if mode == 0 else _balanced(left, ones, right.mT)


def _alternate(tensor: Tensor, rank: int) -> Factors:
    """Alternating least squares; for large kernels in float32, with a last sweep in the kernel's own precision."""
    large = tensor.numel() >= SINGLE
    target = tensor.float() if large else tensor.double()
    sweeps = next((count for numbers, count in FEWER if tensor.numel() >= numbers), SWEEPS)
    o, c, t = _swept(target, _starts(target, rank), sweeps)
    if large and tensor.dtype == torch.float64:
        o, c, t = _swept(tensor, (o.double(), c.double(), t.double()), 1)
    return o.to(tensor.dtype), c.to(tensor.dtype), t.to(tensor.dtype)


def _swept(target: Tensor, factors: Factors, sweeps: int) -> Factors:
    o, c, t = factors
    by_input, by_output = target.transpose(1, 2).contiguous(), target.permute(1, 2, 0).contiguous()
    for _ in range(sweeps):
        through = by_input @ c  # (O, k^2, R), which two of the three factors need
        t = _solve((through * o[:, None]).sum(0), o, c)
        o = _solve((through * t).sum(1), c, t)
        c = _solve(((by_output @ o) * t).sum(1), o, t)
        o, c, t = _balanced(o, c, t)
    return o, c, t


def _starts(target: Tensor, rank: int) -> Factors:
    return _start(target, 0, rank), _start(target, 1, rank), _start(target, 2, rank)


def _start(target: Tensor, mode: int, rank: int) -> Tensor:
    """Leading left singular vectors of the unfolding, completed with seeded noise where it has fewer than R."""
    unfolding = target.movedim(mode, 0).flatten(1)
    if len(unfolding) > unfolding.shape[1]:  # the square of thousands of outputs of few channels would take minutes
        u = torch.linalg.svd(unfolding, full_matrices=False)[0][:, :rank]
    else:
        u = torch.linalg.eigh(unfolding @ unfolding.T).eigenvectors.flip(1)[:, :rank]
    generator = torch.Generator().manual_seed(mode)
    noise = torch.randn(u.shape[0], rank - u.shape[1], dtype=u.dtype, generator=generator)
    return torch.cat([u, noise.to(u.device) / u.shape[0] ** 0.5], dim=1)


def _solve(right: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The least-squares factor, given the other two; with a small ridge, because CP factors may become collinear."""
    gram = (first.T @ first) * (second.T @ second)
    gram.diagonal().add_(
        max(1e-9, 10 * torch.finfo(gram.dtype).eps) * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    )
    return torch.linalg.solve(gram, right.T).T


def _balanced(*factors: Tensor) -> Factors:
    """The same decomposition with columns of equal norm in all three factors."""
    norms = [factor.norm(dim=0).clamp_min(torch.finfo(factor.dtype).tiny) for factor in factors]
    common = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    o, c, t = (factor / norm * common for factor, norm in zip(factors, norms, strict=True))
    return o, c, t


STRUCTURE = Cp()
