"""How an option is built: its lowerings, the geometry of every stage and branch, and what it costs."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from convrewrite.conv import ConvSpec, Cost, Size
from convrewrite.structures.structure import Option, Setting, Stage, Structure


def make_option(structure: Structure, spec: ConvSpec, setting: Setting) -> Option:
    """An option in its standard lowering: a multiplier above one becomes a sum of branches.

    The sum computes the same numbers, and onnxruntime runs it 2 to 3 times faster than ``groups=C, out=r*C``.
    """
    standard = lowerings(structure.stages(spec.per_group, setting))[0]
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
