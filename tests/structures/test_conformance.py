"""Every discovered structure over a grid of geometries: exact at full rank, and as costly as it says."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from networks import macs_by_hooks, relative
from torch import Tensor, nn

from convrewrite.conv import ConvSpec, Cost, PaddingMode, Size
from convrewrite.rewriting.surgery import build_conv, build_option, empty_option
from convrewrite.structures.algebra import initial_kernels
from convrewrite.structures.discovery import discover
from convrewrite.structures.lowering import lowerings, make_option, option_cost
from convrewrite.structures.structure import Setting, Structure

KERNELS: list[Size] = [(1, 1), (3, 3), (5, 5), (3, 1), (1, 5), (2, 3)]
STRIDES: list[Size] = [(1, 1), (2, 2), (2, 1)]
DILATIONS: list[Size] = [(1, 1), (2, 2)]
INPUT: Size = (11, 10)
CHANNELS = (8, 4)
MODES: tuple[PaddingMode, ...] = ("zeros", "reflect", "replicate", "circular")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
BIASES = (True, False)

every_structure = pytest.mark.parametrize("structure", discover().values(), ids=discover().keys())
every_kernel = pytest.mark.parametrize("kernel_size", KERNELS, ids=lambda size: f"{size[0]}x{size[1]}")


@pytest.fixture(autouse=True)
def without_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are built by the thousand here, and drawing initial weights that are overwritten would take the most time."""
    monkeypatch.setattr(nn.modules.conv._ConvNd, "reset_parameters", lambda self: None)


def convolutions(kernel_size: Size, modes: Sequence[PaddingMode] = MODES) -> Iterator[ConvSpec]:
    """Every stride, dilation, padding, padding mode and number of groups that torch supports together."""
    for stride, dilation, groups, mode in itertools.product(STRIDES, DILATIONS, (1, 2), modes):
        for padding in ((1, 1), (0, 2), "same"):
            if padding == "same" and stride != (1, 1):
                continue
            yield ConvSpec(*CHANNELS, kernel_size, stride, padding, dilation, groups, True, mode)


def transposed(kernel_size: Size) -> Iterator[ConvSpec]:
    """As above; output padding is as large as torch allows, and none."""
    for stride, dilation, groups in itertools.product(STRIDES, DILATIONS, (1, 2)):
        largest = tuple(max(s, d) - 1 for s, d in zip(stride, dilation, strict=True))
        for padding, extra in itertools.product(((0, 0), (1, 1), (0, 2)), {(0, 0), largest}):
            yield ConvSpec(*CHANNELS, kernel_size, stride, padding, dilation, groups, True, "zeros", True, extra)


def settings(structure: Structure, spec: ConvSpec) -> Iterator[Setting]:
    """Every variant at full rank."""
    for variant in structure.variants(spec.per_group):
        yield {**variant, "rank": structure.full_rank(spec.per_group, variant)}


Decomposed = list[tuple[Setting, tuple[Tensor, ...]]]


def check_exact(spec: ConvSpec, structure: Structure, decomposed: Decomposed, kernel: Tensor, x: Tensor) -> None:
    bias = torch.linspace(-1, 1, spec.out_channels, dtype=x.dtype) if spec.bias else None
    expected = build_conv(spec, kernel, bias, x)(x)
    assert spec.output_size(INPUT) == tuple(expected.shape[-2:]), spec.describe()
    for setting, kernels in decomposed:
        stages = structure.stages(spec.per_group, setting)
        for lowering in lowerings(stages):
            option = replace(make_option(structure, spec, setting), lowering=lowering)
            found = build_option(spec, stages, option, kernels, bias, x)(x)
            assert (found.shape, found.dtype) == (expected.shape, x.dtype), f"{spec.describe()}: {option.describe()}"
            error = relative(found, expected)
            assert error < TOLERANCE[x.dtype], f"{spec.describe()}, {x.dtype}: {option.describe()}: {error}"


@pytest.mark.parametrize(
    ("dtype", "modes", "alternately", "every"),
    [
        (torch.float64, MODES, True, 1),
        (torch.float32, ("zeros",), True, 3),
        pytest.param(torch.float64, MODES, False, 1, marks=pytest.mark.soak),
        pytest.param(torch.float32, MODES, False, 1, marks=pytest.mark.soak),
    ],
    ids=["float64", "float32", "float64, all", "float32, all"],
)
@every_structure
@every_kernel
@torch.no_grad()
def test_full_rank_equals_the_original(
    structure: Structure,
    kernel_size: Size,
    dtype: torch.dtype,
    modes: Sequence[PaddingMode],
    alternately: bool,
    every: int,
) -> None:
    """Over all geometries in one dtype: another changes how results are rounded, wherever they come from, so ``every`` third is
    enough. ``alternately``: every second geometry has a bias; otherwise each is tried with one and without."""
    if reason := structure.reject(ConvSpec(*CHANNELS, kernel_size)):
        pytest.skip(reason)
    x = torch.randn(1, CHANNELS[0], *INPUT, dtype=torch.float64).to(dtype)
    geometries = [*convolutions(kernel_size, modes), *transposed(kernel_size)]
    checked = 0
    for groups in (1, 2):
        plain = ConvSpec(*CHANNELS, kernel_size, groups=groups)
        kernel = torch.randn(plain.kernel_shape, dtype=dtype)
        decomposed = [(s, initial_kernels(structure, kernel, plain, s)) for s in settings(structure, plain)]
        own = [spec for spec in geometries if spec.groups == groups][::every]
        given = zip(own, itertools.cycle(BIASES), strict=False) if alternately else itertools.product(own, BIASES)
        for spec, bias in given:
            check_exact(replace(spec, bias=bias), structure, decomposed, kernel, x)
            checked += 1
    times = 1 if alternately else len(BIASES)
    each = (
        len(modes) * 2 * (3 + 2 + 2) + 3 * (1 + 2 + 2 + 3 * 2)
    ) / every  # of the geometries without groups, and with
    assert checked == times * 2 * math.ceil(each)


@pytest.mark.parametrize("alternately", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["alternately", "all"])
@every_structure
@every_kernel
@torch.no_grad()
def test_the_cost_is_that_of_the_built_module(structure: Structure, kernel_size: Size, alternately: bool) -> None:
    """At full rank and at rank two; ``alternately``: each of them at every second geometry."""
    x = torch.randn(1, CHANNELS[0], *INPUT)
    if reason := structure.reject(ConvSpec(*CHANNELS, kernel_size)):
        pytest.skip(reason)
    for index, spec in enumerate([*convolutions(kernel_size, modes=("zeros",)), *transposed(kernel_size)]):
        assert spec.macs(INPUT) == macs_by_hooks(spec.build(), x)
        full = list(settings(structure, spec))
        low: list[Setting] = [{**setting, "rank": min(2, int(setting["rank"]))} for setting in full]
        for setting in [*full, *low] if not alternately else (full, low)[index % 2]:
            stages = structure.stages(spec.per_group, setting)
            for lowering in lowerings(stages):
                option = replace(make_option(structure, spec, setting), lowering=lowering)
                module = empty_option(spec, stages, option, x)
                found = Cost(sum(p.numel() for p in module.parameters()), macs_by_hooks(module, x))
                counted = option_cost(spec, stages, [INPUT], lowering)
                assert counted == found, f"{spec.describe()}: {option.describe()}"


@every_structure
def test_a_rejection_is_a_sentence_and_depends_on_the_geometry(structure: Structure) -> None:
    reasons = [structure.reject(ConvSpec(8, 8, size)) for size in KERNELS]
    assert None in reasons, "a structure must take some geometry"
    assert all(reason is None or len(reason.split()) > 2 for reason in reasons)


@every_structure
def test_costs_rise_with_the_rank_and_full_rank_is_the_last(structure: Structure) -> None:
    spec = ConvSpec(8, 12, (3, 3), padding=(1, 1))
    for variant in structure.variants(spec):
        ranks = range(1, structure.full_rank(spec, variant) + 1)
        costs = []
        for rank in ranks:
            setting = {**variant, "rank": rank}
            option = make_option(structure, spec, setting)
            costs.append(option_cost(spec, structure.stages(spec, setting), [(9, 9)], option.lowering).macs)
        assert costs == sorted(costs)
        assert len(set(costs)) == len(costs) or structure.name == "tucker"


@every_structure
@pytest.mark.parametrize("channels", [(1, 5), (5, 1), (1, 1), (3, 16), (16, 2)])
@torch.no_grad()
def test_narrow_convolutions_are_exact_too(structure: Structure, channels: Size) -> None:
    spec = ConvSpec(*channels, (3, 3), padding=(1, 1))
    if reason := structure.reject(spec):
        pytest.skip(reason)
    kernel = torch.randn(spec.kernel_shape, dtype=torch.float64)
    decomposed = [(s, initial_kernels(structure, kernel, spec, s)) for s in settings(structure, spec)]
    assert decomposed
    check_exact(spec, structure, decomposed, kernel, torch.randn(1, channels[0], *INPUT, dtype=torch.float64))


@every_structure
@torch.no_grad()
def test_a_zero_kernel_stays_zero_and_finite(structure: Structure) -> None:
    spec = ConvSpec(8, 6, (3, 3), padding=(1, 1))
    kernel = torch.zeros(spec.kernel_shape)
    for setting in settings(structure, spec):
        for rank in (1, int(setting["rank"])):
            kernels = initial_kernels(structure, kernel, spec, {**setting, "rank": rank})
            stages = structure.stages(spec, {**setting, "rank": rank})
            option = make_option(structure, spec, {**setting, "rank": rank})
            module = build_option(spec, stages, option, kernels, torch.ones(6), kernel)
            assert torch.equal(module(torch.randn(1, 8, 5, 5)), torch.ones(1, 6, 5, 5))
