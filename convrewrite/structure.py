"""What a structure is, and everything about one that follows from its stages' shapes.

A structure replaces one convolution by a chain of smaller ones, ``W' = P . ... . A``: linear, without a bias on any stage
but the last. Its author gives the *shapes* of the stages and initial weights for the ungrouped case. From these this
module derives the geometry of every stage, the cost, the lowering, the composed kernel and the case of a grouped
original, so an author can neither misreport a cost nor lose a stride.

The axis rule: of each kernel axis one stage is the owner, and it alone has that axis' kernel extent, stride, padding,
dilation and output padding. Two stages that both padded, or a bias before a padding, would change the borders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from convrewrite.conv import ConvSpec, Cost, Size

Setting = Mapping[str, int | str]
"""A structure's parameters by name, such as ``{"order": "depthwise-first", "rank": 2}``; ``rank`` is always among them."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The shape of one stage: ``axes`` names the kernel axes it owns, ``""``, ``"h"``, ``"w"`` or ``"hw"``."""

    in_channels: int
    out_channels: int
    axes: str = ""
    groups: int = 1

    def kernel_shape(self, kernel_size: Size) -> tuple[int, int, int, int]:
        """The canonical weight shape, given the kernel size of the convolution that is replaced."""
        kh, kw = kernel_size
        return (
            self.out_channels,
            self.in_channels // self.groups,
            kh if "h" in self.axes else 1,
            kw if "w" in self.axes else 1,
        )


class Structure(Protocol):
    """A family of linear replacements. One file in ``structures/`` holds one, as its module attribute ``STRUCTURE``.

    ``spec`` is always ungrouped: the framework splits a grouped convolution and joins the results.
    """

    @property
    def name(self) -> str:
        """The name that rules use."""
        ...

    @property
    def reference(self) -> str:
        """Where it comes from."""
        ...

    def reject(self, spec: ConvSpec) -> str | None:
        """Why this geometry has no such replacement, or None."""
        ...

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        """The discrete choices apart from the rank, for example both orders."""
        ...

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        """The smallest rank that reproduces any kernel exactly."""
        ...

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        """The shapes of the stages, first to last."""
        ...

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        """Initial stage weights for a kernel ``(O, C, kh, kw)``; exact at full rank, in the kernel's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Option:
    """A structure with its parameters and its lowering at one site."""

    structure: str
    setting: tuple[tuple[str, int | str], ...] = ()
    lowering: str = "chain"

    @property
    def parameters(self) -> dict[str, int | str]:
        """The setting as a dictionary."""
        return dict(self.setting)

    def describe(self) -> str:
        """``separable, rank 2, depthwise-first, as branches``."""
        numbers = [f"{name} {value}" for name, value in self.setting if isinstance(value, int)]
        words = [value for _, value in self.setting if isinstance(value, str)]
        lowering = [f"as {self.lowering}"] if self.lowering != "chain" else []
        return ", ".join([self.structure, *numbers, *words, *lowering])


def make_option(structure: Structure, spec: ConvSpec, setting: Setting, lowering: str | None = None) -> Option:
    """An option in its standard lowering: a multiplier above one becomes a sum of branches.

    The sum computes the same numbers, and onnxruntime runs it 2 to 3 times faster than ``groups=C, out=r*C``.
    """
    standard = lowering or lowerings(structure.stages(spec.per_group, setting))[0]
    return Option(structure.name, tuple(sorted(setting.items())), standard)


def lowerings(stages: Sequence[Stage]) -> tuple[str, ...]:
    """The ways in which a chain can be computed, the preferred one first."""
    return ("branches", "chain") if _multiplier(stages) > 1 else ("chain",)


def _multiplier(stages: Sequence[Stage]) -> int:
    """How many depthwise-and-pointwise pairs the chain is a sum of; 1 when it is no such sum."""
    if len(stages) != 2:
        return 1
    first, last = stages
    if first.groups == first.in_channels > 1 and last.groups == 1:
        return first.out_channels // first.in_channels
    if last.groups == last.out_channels > 1 and first.groups == 1:
        return last.in_channels // last.out_channels
    return 1


def stage_specs(spec: ConvSpec, stages: Sequence[Stage]) -> tuple[ConvSpec, ...]:
    """The geometry of every stage of the replacement of ``spec`` (grouped or not), by the axis rule."""
    *first, last = stages
    return (
        *(_stage_spec(spec, stage, bias=False, kernels=1) for stage in first),
        _stage_spec(spec, last, bias=spec.bias, kernels=spec.kernels),
    )


def _stage_spec(spec: ConvSpec, stage: Stage, bias: bool, kernels: int) -> ConvSpec:
    owned = ("h" in stage.axes, "w" in stage.axes)
    plain = replace(
        spec,
        in_channels=stage.in_channels * spec.groups,
        out_channels=stage.out_channels * spec.groups,
        groups=stage.groups * spec.groups,
        bias=bias,
        kernels=kernels,
    )
    if not any(owned):
        return ConvSpec(
            plain.in_channels,
            plain.out_channels,
            (1, 1),
            groups=plain.groups,
            bias=bias,
            kernels=kernels,
            dims=spec.dims,
        )
    padding = spec.padding if isinstance(spec.padding, str) else _own(spec.padding, owned, 0)
    return replace(
        plain,
        kernel_size=_own(spec.kernel_size, owned, 1),
        stride=_own(spec.stride, owned, 1),
        padding=padding,
        dilation=_own(spec.dilation, owned, 1),
        output_padding=_own(spec.output_padding, owned, 0),
    )


def _own(values: Size, owned: tuple[bool, bool], otherwise: int) -> Size:
    return (values[0] if owned[0] else otherwise, values[1] if owned[1] else otherwise)


def branch_specs(spec: ConvSpec, stages: Sequence[Stage], lowering: str) -> tuple[tuple[ConvSpec, ...], ...]:
    """The geometry as it is built: one chain, or the chains whose outputs are added. Only the first has the bias."""
    count = _multiplier(stages) if lowering == "branches" else 1
    if count == 1:
        return (stage_specs(spec, stages),)
    first, last = stages
    if first.groups == first.in_channels:
        narrow = (replace(first, out_channels=first.in_channels), replace(last, in_channels=first.in_channels))
    else:
        narrow = (replace(first, out_channels=last.out_channels), replace(last, in_channels=last.out_channels))
    with_bias = stage_specs(spec, narrow)
    without = stage_specs(replace(spec, bias=False), narrow)
    return (with_bias, *[without] * (count - 1))


def branch_kernels(kernels: Sequence[Tensor], stages: Sequence[Stage], lowering: str) -> tuple[tuple[Tensor, ...], ...]:
    """Canonical stage kernels, distributed over the chains of :func:`branch_specs`."""
    count = _multiplier(stages) if lowering == "branches" else 1
    if count == 1:
        return (tuple(kernels),)
    first, last = kernels
    return tuple((first[j::count], last[:, j::count]) for j in range(count))


def option_cost(spec: ConvSpec, stages: Sequence[Stage], input_sizes: Sequence[Size], lowering: str = "chain") -> Cost:
    """Parameters and MACs of the replacement, counted from the shapes of what will be built."""
    total = Cost()
    for branch in branch_specs(spec, stages, lowering):
        sizes = list(input_sizes)
        for stage in branch:
            total += stage.cost(sizes)
            sizes = [stage.output_size(size) for size in sizes]
    return total


def compose(kernels: Sequence[Tensor], stages: Sequence[Stage]) -> Tensor:
    """The kernel ``(O, C, kh, kw)`` that a chain of ungrouped-original stages amounts to."""
    total = _dense(kernels[0], stages[0].groups)
    for kernel, stage in zip(kernels[1:], stages[1:], strict=True):
        groups = stage.groups
        before = total.unflatten(0, (groups, -1))
        after = kernel.unflatten(0, (groups, -1))
        # Of each spatial axis one operand has extent one, so broadcasting it is the convolution of the two kernels.
        total = torch.einsum("gomhw,gmchw->gochw", after, before).flatten(0, 1)
    return total


def _dense(kernel: Tensor, groups: int) -> Tensor:
    """A grouped kernel with its zeros written out."""
    if groups == 1:
        return kernel
    per_group = kernel.unflatten(0, (groups, -1))
    eye = torch.eye(groups, dtype=kernel.dtype, device=kernel.device)
    return torch.einsum("gochw,gk->gokchw", per_group, eye).flatten(2, 3).flatten(0, 1)


def through(stage: Stage, kernel: Tensor, patches: Tensor) -> Tensor:
    """One stage applied to patches ``(N, C, h, w)`` whose owned axes hold exactly one kernel extent: ``(N, O, h', w')``."""
    x = patches.unflatten(1, (stage.groups, -1))
    k = kernel.unflatten(0, (stage.groups, -1))
    match stage.axes:
        case "hw":
            return torch.einsum("ngchw,gochw->ngo", x, k).flatten(1)[:, :, None, None]
        case "h":
            return torch.einsum("ngchw,goch->ngow", x, k[..., 0]).flatten(1, 2)[:, :, None, :]
        case "w":
            return torch.einsum("ngchw,gocw->ngoh", x, k[..., 0, :]).flatten(1, 2)[..., None]
        case _:
            return torch.einsum("ngchw,goc->ngohw", x, k[..., 0, 0]).flatten(1, 2)


def low_rank(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrices of a rank as factors ``(..., n, rank)`` and ``(..., rank, m)``, their singular values shared evenly.

    The singular vectors of the shorter side come from the eigenvectors of its Gram matrix, which takes a tenth of the time of
    an SVD. They are orthonormal whatever the rounding, so at full rank the product is exact.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        left, right = low_rank(matrices.mT, rank)
        return right.mT, left.mT
    squares, vectors = torch.linalg.eigh(matrices.mT @ matrices)
    squares, vectors = squares.flip(-1)[..., :rank], vectors.flip(-1)[..., :rank]
    # Where a singular value is lost in rounding, any share of its direction is as good: it must only be finite.
    least = squares[..., :1].clamp_min(0) * torch.finfo(squares.dtype).eps + torch.finfo(squares.dtype).tiny
    root = torch.maximum(squares, least) ** 0.25
    return matrices @ vectors / root[..., None, :], (vectors * root[..., None, :]).mT


def split_groups(kernel: Tensor, groups: int) -> tuple[Tensor, ...]:
    """A canonical grouped kernel -> the kernels of its groups."""
    return kernel.chunk(groups, dim=0)


def join_groups(per_group: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Stage kernels of every group -> the stage kernels of the grouped whole."""
    return tuple(torch.cat(stage, dim=0) for stage in zip(*per_group, strict=True))


def initial_kernels(structure: Structure, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
    """Weights-only stage kernels for a convolution with any number of groups."""
    parts = split_groups(kernel, spec.groups)
    return join_groups([structure.weights(part, spec.per_group, setting) for part in parts])


Allowed = Mapping[str, Sequence[int | float | str]]
"""Values to which a rule restricts a structure's parameters."""


def allowed_variants(structure: Structure, spec: ConvSpec, allowed: Allowed) -> list[Setting]:
    """The structure's variants at this geometry whose every parameter has an allowed value."""
    variants = [v for v in structure.variants(spec.per_group) if spec.kernels == 1 or _mixes(structure, spec, v)]
    return [v for v in variants if all(v[name] in values for name, values in allowed.items() if name in v)]


def _mixes(structure: Structure, spec: ConvSpec, variant: Setting) -> bool:
    """Whether the last stage is a dense one, of which each of several kernels can have its own."""
    return structure.stages(spec.per_group, {**variant, "rank": 1})[-1].groups == 1


def allowed_ranks(structure: Structure, spec: ConvSpec, variant: Setting, allowed: Allowed) -> Sequence[int]:
    """The ranks of a variant, ascending; all from one to full rank unless restricted."""
    top = structure.full_rank(spec.per_group, variant)
    if "rank" not in allowed:
        return range(1, top + 1)
    return sorted(int(rank) for rank in allowed["rank"] if 1 <= int(rank) <= top)
