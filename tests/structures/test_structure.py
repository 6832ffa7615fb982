"""What follows from the shapes of stages: geometry, lowering, composition; and the decompositions from weights."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from networks import SPECS, relative
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.rewriting.surgery import build_conv, build_option
from convrewrite.rules.options import allowed_ranks, allowed_variants
from convrewrite.structures import discovery as package
from convrewrite.structures.algebra import compose, initial_kernels, low_rank, split_groups, through
from convrewrite.structures.discovery import discover
from convrewrite.structures.lowering import branch_kernels, branch_specs, lowerings, make_option, stage_specs
from convrewrite.structures.structure import Option, Setting, Stage, Structure

ROUND = ConvSpec(8, 12, (3, 3), padding=(1, 1))
every_structure = pytest.mark.parametrize("structure", discover().values(), ids=discover().keys())
named_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def errors_by_rank(structure: Structure, kernel: Tensor, variant: Setting, spec: ConvSpec = ROUND) -> list[float]:
    """Relative error of the composed kernel at every rank."""
    found = []
    for rank in range(1, structure.full_rank(spec, variant) + 1):
        setting = {**variant, "rank": rank}
        composed = compose(structure.weights(kernel, spec, setting), structure.stages(spec, setting))
        found.append(relative(composed, kernel))
    return found


# --- the axis rule


def test_each_axis_is_owned_by_one_stage() -> None:
    spec = ConvSpec(4, 6, (3, 5), (2, 3), (1, 2), (2, 1), padding_mode="reflect")
    first, last = stage_specs(spec, (Stage(4, 7, "h"), Stage(7, 6, "w")))
    assert first == ConvSpec(4, 7, (3, 1), (2, 1), (1, 0), (2, 1), bias=False, padding_mode="reflect")
    assert last == ConvSpec(7, 6, (1, 5), (1, 3), (0, 2), (1, 1), bias=True, padding_mode="reflect")


def test_a_stage_that_owns_no_axis_is_a_plain_pointwise() -> None:
    spec = ConvSpec(4, 6, (3, 3), (2, 2), "valid", (2, 2), padding_mode="circular")
    first, middle, last = stage_specs(spec, (Stage(4, 2), Stage(2, 2, "hw", groups=2), Stage(2, 6)))
    assert first == ConvSpec(4, 2, (1, 1), bias=False)
    assert middle == ConvSpec(2, 2, (3, 3), (2, 2), "valid", (2, 2), 2, False, "circular")
    assert last == ConvSpec(2, 6, (1, 1), bias=True)


def test_output_padding_goes_with_its_axis() -> None:
    spec = ConvSpec(4, 6, (3, 3), (2, 3), (1, 0), transposed=True, output_padding=(1, 2))
    first, last = stage_specs(spec, (Stage(4, 7, "w"), Stage(7, 6, "h")))
    assert (first.stride, first.padding, first.output_padding, first.transposed) == ((1, 3), (0, 0), (0, 2), True)
    assert (last.stride, last.padding, last.output_padding, last.transposed) == ((2, 1), (1, 0), (1, 0), True)


def test_only_the_last_stage_has_a_bias_and_only_if_the_original_has() -> None:
    stages = (Stage(4, 2), Stage(2, 2, "hw"), Stage(2, 6))
    assert [s.bias for s in stage_specs(ConvSpec(4, 6, (3, 3)), stages)] == [False, False, True]
    assert [s.bias for s in stage_specs(ConvSpec(4, 6, (3, 3), bias=False), stages)] == [False, False, False]


def test_a_grouped_original_multiplies_channels_and_groups_of_every_stage() -> None:
    spec = ConvSpec(8, 12, (3, 3), padding=(1, 1), groups=2)
    first, last = stage_specs(spec, (Stage(4, 8, "hw", groups=4), Stage(8, 6)))
    assert (first.in_channels, first.out_channels, first.groups) == (8, 16, 8)
    assert (last.in_channels, last.out_channels, last.groups) == (16, 12, 2)


# --- lowering

DEPTHWISE_FIRST: Setting = {"order": "depthwise-first", "rank": 3}
POINTWISE_FIRST: Setting = {"order": "pointwise-first", "rank": 3}


@pytest.mark.parametrize("setting", [DEPTHWISE_FIRST, POINTWISE_FIRST])
@pytest.mark.parametrize(
    "name", ["standard", "strided", "grouped", "transposed", "transposed, grouped", "same, circular"]
)
@torch.no_grad()
def test_branches_compute_what_the_chain_computes(name: str, setting: Setting) -> None:
    spec, structure = SPECS[name], discover()["separable"]
    setting = {**setting, "rank": min(3, structure.full_rank(spec.per_group, setting))}
    kernel, bias = torch.randn(spec.kernel_shape, dtype=torch.float64), torch.randn(spec.out_channels).double()
    stages = structure.stages(spec.per_group, setting)
    kernels = initial_kernels(structure, kernel, spec, setting)
    x = torch.randn(2, spec.in_channels, 8, 8, dtype=torch.float64)
    modules = [
        build_option(spec, stages, Option("separable", (), way), kernels, bias, x) for way in ("branches", "chain")
    ]
    assert len(modules[0]) == setting["rank"], "one branch for each unit of the multiplier"
    assert relative(modules[0](x), modules[1](x)) < 1e-12


def test_branches_are_preferred_and_only_possible_for_a_multiplier() -> None:
    separable, channel = discover()["separable"], discover()["channel"]
    assert lowerings(separable.stages(ROUND, DEPTHWISE_FIRST)) == ("branches", "chain")
    assert lowerings(separable.stages(ROUND, {**DEPTHWISE_FIRST, "rank": 1})) == ("chain",)
    assert lowerings(channel.stages(ROUND, {"rank": 4})) == ("chain",)
    assert make_option(separable, ROUND, POINTWISE_FIRST).lowering == "branches"


def test_one_branch_has_the_bias_of_all() -> None:
    stages = discover()["separable"].stages(ROUND, DEPTHWISE_FIRST)
    chains = branch_specs(ROUND, stages, "branches")
    assert [[spec.bias for spec in chain] for chain in chains] == [[False, True], [False, False], [False, False]]
    assert all(chain[0].groups == chain[0].out_channels == 8 for chain in chains)


def test_branch_kernels_have_the_shapes_of_branch_specs() -> None:
    for setting in (DEPTHWISE_FIRST, POINTWISE_FIRST):
        spec, structure = SPECS["grouped"], discover()["separable"]
        stages = structure.stages(spec.per_group, setting)
        kernels = initial_kernels(structure, torch.randn(spec.kernel_shape), spec, setting)
        specs, parts = branch_specs(spec, stages, "branches"), branch_kernels(kernels, stages, "branches")
        assert [[k.shape for k in part] for part in parts] == [[s.kernel_shape for s in chain] for chain in specs]


# --- composition


@every_structure
@named_specs
@torch.no_grad()
def test_the_composed_kernel_is_what_the_stages_compute(structure: Structure, spec: ConvSpec) -> None:
    if reason := structure.reject(spec.per_group):
        assert reason
        return
    x = torch.randn(2, spec.in_channels, 9, 8, dtype=torch.float64)
    bias = torch.randn(spec.out_channels, dtype=torch.float64) if spec.bias else None
    for variant in structure.variants(spec.per_group):
        setting = {**variant, "rank": min(2, structure.full_rank(spec.per_group, variant))}
        stages = structure.stages(spec.per_group, setting)
        groups = [
            [torch.randn(s.kernel_shape(spec.kernel_size), dtype=torch.float64) for s in stages]
            for _ in range(spec.groups)
        ]
        composed = torch.cat([compose(kernels, stages) for kernels in groups])
        joined = [torch.cat(stage) for stage in zip(*groups, strict=True)]
        built = build_option(spec, stages, make_option(structure, spec, setting), joined, bias, x)
        assert relative(built(x), build_conv(spec, composed, bias, x)(x)) < 1e-12


@every_structure
def test_going_through_the_stages_is_the_composed_kernel_on_a_patch(structure: Structure) -> None:
    patches = torch.randn(7, 8, 3, 3, dtype=torch.float64)
    for variant in structure.variants(ROUND):
        stages = structure.stages(ROUND, {**variant, "rank": 2})
        kernels = [torch.randn(s.kernel_shape((3, 3)), dtype=torch.float64) for s in stages]
        value = patches.permute(1, 2, 3, 0)
        for stage, kernel in zip(stages, kernels, strict=True):
            value = through(stage, kernel, value)
        expected = patches.flatten(1) @ compose(kernels, stages).flatten(1).T
        assert value.shape == (12, 1, 1, 7)
        torch.testing.assert_close(value.flatten(0, 2).T, expected)


# --- decompositions from the weights


@every_structure
def test_the_error_falls_with_the_rank_down_to_nothing(structure: Structure) -> None:
    kernel = torch.randn(ROUND.kernel_shape, dtype=torch.float64)
    for variant in structure.variants(ROUND):
        errors = errors_by_rank(structure, kernel, variant)
        slack = 5e-3 if structure.name == "cp" else 1e-6  # alternating least squares stops before it is still
        assert all(after <= before + slack for before, after in itertools.pairwise(errors)), errors
        assert errors[0] > 0.1
        assert errors[-1] < 1e-10


@every_structure
def test_a_kernel_of_low_rank_is_found_exactly(structure: Structure) -> None:
    for variant in structure.variants(ROUND):
        setting = {**variant, "rank": 2}
        stages = structure.stages(ROUND, setting)
        factors = [torch.randn(s.kernel_shape((3, 3)), dtype=torch.float64) for s in stages]
        kernel = compose(factors, stages)
        found = compose(structure.weights(kernel, ROUND, setting), stages)
        assert relative(found, kernel) < (1e-3 if structure.name == "cp" else 1e-10)


@every_structure
def test_weights_have_the_stages_shapes_and_the_kernels_dtype(structure: Structure) -> None:
    for dtype in (torch.float32, torch.float64):
        kernel = torch.randn(ROUND.kernel_shape, dtype=dtype)
        for variant in structure.variants(ROUND):
            for rank in (1, 3, structure.full_rank(ROUND, variant)):
                setting = {**variant, "rank": rank}
                kernels = structure.weights(kernel, ROUND, setting)
                stages = structure.stages(ROUND, setting)
                assert [k.shape for k in kernels] == [s.kernel_shape((3, 3)) for s in stages]
                assert {k.dtype for k in kernels} == {dtype}


@every_structure
def test_weights_are_the_same_every_time(structure: Structure) -> None:
    kernel = torch.randn(ROUND.kernel_shape)
    setting = {**structure.variants(ROUND)[0], "rank": 3}
    first = structure.weights(kernel, ROUND, setting)
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(first, structure.weights(kernel, ROUND, setting), strict=True))


def test_the_svd_structures_are_the_best_of_their_shape() -> None:
    kernel = torch.randn(ROUND.kernel_shape, dtype=torch.float64)
    values = torch.linalg.svdvals(kernel.flatten(1))
    errors = errors_by_rank(discover()["channel"], kernel, {})
    for rank, error in enumerate(errors, start=1):
        assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-9)
    matrix = kernel.permute(1, 2, 0, 3).reshape(24, 36)
    values = torch.linalg.svdvals(matrix)
    errors = errors_by_rank(discover()["asymmetric"], kernel, {"order": "vertical-first"})
    for rank, error in enumerate(errors, start=1):
        assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-9)


def test_cp_sweeps_never_raise_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = __import__("convrewrite.structures.families.cp", fromlist=["cp"])
    kernel = torch.randn(ROUND.kernel_shape, dtype=torch.float64)
    setting: Setting = {"rank": 5}
    errors = []
    for sweeps in (1, 2, 4, 8, 16, 40):
        monkeypatch.setattr(cp, "SWEEPS", sweeps)
        errors.append(
            relative(compose(cp.STRUCTURE.weights(kernel, ROUND, setting), cp.STRUCTURE.stages(ROUND, setting)), kernel)
        )
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < errors[0] - 1e-3


def test_cp_columns_are_balanced_between_the_factors() -> None:
    kernels = discover()["cp"].weights(torch.randn(ROUND.kernel_shape), ROUND, {"rank": 4})
    norms = [kernels[0].flatten(1).norm(dim=1), kernels[1].flatten(1).norm(dim=1), kernels[2].flatten(1).norm(dim=0)]
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(norms[0], norms[2])


def test_higher_order_orthogonal_iteration_beats_one_pass_and_is_orthonormal(monkeypatch: pytest.MonkeyPatch) -> None:
    tucker = __import__("convrewrite.structures.families.tucker", fromlist=["tucker"])
    kernel = torch.randn(ROUND.kernel_shape, dtype=torch.float64)
    setting: Setting = {"rank": 6}
    stages = tucker.STRUCTURE.stages(ROUND, setting)
    errors = []
    for sweeps in (1, 2, 4, 10):
        monkeypatch.setattr(tucker, "SWEEPS", sweeps)
        first, core, last = tucker.STRUCTURE.weights(kernel, ROUND, setting)
        errors.append(relative(compose((first, core, last), stages), kernel))
        torch.testing.assert_close(first[..., 0, 0] @ first[..., 0, 0].T, torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(last[..., 0, 0].T @ last[..., 0, 0], torch.eye(6, dtype=torch.float64))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("spec", [ConvSpec(1, 40, (1, 30)), ConvSpec(40, 1, (5, 6))], ids=["one input", "one output"])
def test_cp_of_a_single_input_or_output_is_the_nearest_matrix(spec: ConvSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    cp = __import__("convrewrite.structures.families.cp", fromlist=["cp"])
    monkeypatch.setattr(cp, "_swept", None)  # each sweep takes long for a window of hundreds of samples
    kernel = torch.randn(spec.kernel_shape, dtype=torch.float64)
    left, right = low_rank(kernel.reshape(40, 30), 7)
    found = compose(cp.STRUCTURE.weights(kernel, spec, {"rank": 7}), cp.STRUCTURE.stages(spec, {"rank": 7}))
    torch.testing.assert_close(found.reshape(40, 30), left @ right)


@pytest.mark.parametrize("name", ["cp", "tucker"])
def test_no_square_of_many_outputs_is_decomposed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that another network predicts are thousands of outputs of a few channels."""
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (sizes.append(len(matrix)), eigh(matrix))[1])
    spec = ConvSpec(4, 600, (1, 3))
    kernel = torch.randn(spec.kernel_shape, dtype=torch.float64)
    structure = discover()[name]
    for rank in (300, 500, 600) if name == "tucker" else (3, 11):
        last = structure.weights(kernel, spec, {"rank": rank})[-1][..., 0, 0]
        if name == "tucker":
            torch.testing.assert_close(last.T @ last, torch.eye(rank, dtype=torch.float64))
    assert max(sizes) <= 4 * 3


def test_the_least_rank_that_reproduces_any_kernel_and_which_kernels_are_taken() -> None:
    known, spec = discover(), ConvSpec(2, 64, (3, 5))
    expected = {
        "asymmetric": [2 * 3, 2 * 5], "channel": [2 * 3 * 5], "cp": [2 * 3 * 5], "separable": [3 * 5, 2], "tucker": [64],
    }  # fmt: skip
    for name, ranks in expected.items():
        assert [known[name].full_rank(spec, variant) for variant in known[name].variants(spec)] == ranks, name
    refused = {
        size: {n for n in expected if known[n].reject(ConvSpec(4, 8, size))} for size in ((1, 1), (1, 3), (3, 3))
    }
    assert refused == {(1, 1): expected.keys() - {"channel"}, (1, 3): {"asymmetric"}, (3, 3): set()}


def test_grouped_takes_powers_of_two_and_says_so_where_there_is_none() -> None:
    grouped = discover()["grouped"]
    assert [v["groups"] for v in grouped.variants(ConvSpec(12, 8, (3, 3)))] == [2, 4]
    assert [v["groups"] for v in grouped.variants(ConvSpec(4, 8, (3, 3)))] == [2]
    for channels in (1, 2, 9):
        reason = f"the input channels ({channels}) do not divide into 2, 4, 8 or more groups of at least two"
        assert grouped.reject(ConvSpec(channels, 8, (3, 3))) == reason


def test_grouped_is_the_family_of_channel_and_separable() -> None:
    kernel = torch.randn(ROUND.kernel_shape, dtype=torch.float64)
    for groups, name, variant in ((1, "channel", {}), (8, "separable", {"order": "depthwise-first"})):
        setting = {"groups": groups, "rank": 2}
        member, family = discover()[name], discover()["grouped"]
        ours = compose(family.weights(kernel, ROUND, setting), family.stages(ROUND, setting))
        theirs = compose(
            member.weights(kernel, ROUND, {**variant, "rank": 2}), member.stages(ROUND, {**variant, "rank": 2})
        )
        torch.testing.assert_close(ours, theirs)


def test_a_grouped_original_is_decomposed_group_by_group() -> None:
    spec, structure = SPECS["grouped"], discover()["channel"]
    kernel = torch.randn(spec.kernel_shape)
    joined = initial_kernels(structure, kernel, spec, {"rank": 2})
    for group, part in enumerate(split_groups(kernel, 2)):
        alone = structure.weights(part, spec.per_group, {"rank": 2})
        assert all(torch.equal(stage.chunk(2)[group], k) for stage, k in zip(joined, alone, strict=True))


# --- options and what rules allow


def test_an_option_is_a_value_that_describes_itself() -> None:
    option = make_option(discover()["separable"], ROUND, {"rank": 2, "order": "depthwise-first"})
    assert option == make_option(discover()["separable"], ROUND, {"order": "depthwise-first", "rank": 2})
    assert option.parameters == {"order": "depthwise-first", "rank": 2}
    assert option.describe() == "separable, rank 2, depthwise-first, as branches"


def test_allowed_values_restrict_variants_and_ranks() -> None:
    separable = discover()["separable"]
    both = allowed_variants(separable, ROUND, {})
    assert [v["order"] for v in both] == ["depthwise-first", "pointwise-first"]
    assert allowed_variants(separable, ROUND, {"order": ["pointwise-first"]}) == [both[1]]
    assert allowed_variants(separable, ROUND, {"order": ["sideways"]}) == []
    assert list(allowed_ranks(separable, ROUND, both[0], {})) == list(range(1, 10))
    assert list(allowed_ranks(separable, ROUND, both[0], {"rank": [4, 0, 2, 99]})) == [2, 4]


# --- discovery


def test_every_module_of_the_package_is_discovered() -> None:
    assert set(discover()) >= {"asymmetric", "channel", "cp", "grouped", "separable", "tucker"}
    assert all(name == structure.name and structure.reference for name, structure in discover().items())


def test_an_entry_point_adds_a_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Butterfly(type(discover()["channel"])):  # type: ignore[misc]
        name = "butterfly"

    point = SimpleNamespace(name="butterfly", load=Butterfly)
    found = {package.ENTRY_POINTS: [point]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found.get(group, []))
    assert discover()["butterfly"].name == "butterfly"
