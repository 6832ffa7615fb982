"""Effects as they are measured, against replacing one site in a copy of the model and running the whole of it."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from clocks import FalseTimer, by_macs
from networks import (
    Branching,
    CalledTwice,
    Chain,
    NineKinds,
    Refilling,
    Residual,
    TwoNames,
    natural,
    settled,
    state_bytes,
)
from torch import Tensor, nn
from torch.nn import functional as F
from works import work_of

from convrewrite.calibration.batches import Calibration
from convrewrite.conv import Cost, Size
from convrewrite.errors import PlanError
from convrewrite.fitting import Fit
from convrewrite.fitting.stages import MIN_ITERATIONS
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.machine import channel_block
from convrewrite.meanings import Meaning
from convrewrite.planning import candidates, effects, sensitivities
from convrewrite.planning.allocation import allocate
from convrewrite.planning.costs import Timed
from convrewrite.planning.curves import Surveyed
from convrewrite.planning.effects import Evaluator, _measured_on
from convrewrite.planning.effort import FAST, THOROUGH, Effort, fewer
from convrewrite.planning.latency_table import LatencyTable, aligned
from convrewrite.planning.sensitivities import survey
from convrewrite.rewriting.site_fit import SiteFit
from convrewrite.rewriting.surgery import replace_site
from convrewrite.rules.options import search_spaces
from convrewrite.rules.schema import Protect, Require, Rule
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.structures.discovery import discover
from convrewrite.structures.structure import Option, Structure

QUICK = Effort(ranks=2, measured=2, iterations=1)
STRUCTURES = discover()
Pairs = Sequence[tuple[Tensor, Tensor]]


def data(dtype: torch.dtype = torch.float64, held_out: int = 2) -> Calibration:
    parts = natural(4 * (2 + held_out), 3, 12, 12, dtype).split(4)
    return Calibration(tuple((p,) for p in parts[:2]), tuple((p,) for p in parts[2:]), "data", "a test")


def surveyed(
    model: nn.Module,
    calibration: Calibration,
    *names: str,
    effort: Effort = QUICK,
    timer: FalseTimer | None = None,
    batch: int | None = None,
    rules: Sequence[str] = ("r",),
    **rule: object,
) -> tuple[Surveyed, ...]:
    """The survey of all sites of a model under rules of these names that are alike and protect none of them; ``batch``: how many
    examples it takes."""
    example = tuple(tensor[: batch or 1] for tensor in (*calibration.fit, *calibration.held_out)[0])
    traced = trace(model)
    free = Protect(stem=False, min_channels=0, min_mac_share=0)
    told = [Rule(**{"name": name, "structures": names, "protect": free, **rule}) for name in rules]  # type: ignore[arg-type]
    space = search_spaces(find_sites(model, example, traced), told, STRUCTURES)
    work = work_of(model, calibration, traced=traced, search_spaces=space, batch=batch)
    return survey(work, effort=effort, latency_table=LatencyTable(STRUCTURES, timer=timer) if timer else None)


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Site, nn.Module, float]]:
    """Every module whose effect is measured, and that effect."""
    seen: list[tuple[Site, nn.Module, float]] = []
    measure = Evaluator.effect

    def effect(self: Evaluator, site: Site, module: nn.Module) -> float:
        seen.append((site, copy.deepcopy(module), measure(self, site, module)))
        return seen[-1][2]

    monkeypatch.setattr(Evaluator, "effect", effect)
    return seen


def divergence(pairs: Pairs) -> float:
    """KL of the softmax, the mean over all examples."""
    a, b = (torch.cat(side).double().log_softmax(1) for side in zip(*pairs, strict=True))
    return float(F.kl_div(b, a, reduction="batchmean", log_target=True))


def unexplained(pairs: Pairs) -> float:
    """The part of the variance of a channel that is lost, the mean over the channels."""
    a, b = (torch.cat([tensor.double() for tensor in side]) for side in zip(*pairs, strict=True))
    rows, differences = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (a, a - b))
    return float((differences.square().mean(0) / rows.var(0)).mean())


@torch.no_grad()
def replaced(model: nn.Module, site: Site, module: nn.Module, calibration: Calibration) -> list[tuple[Tensor, Tensor]]:
    """The outputs of a model and of a copy with this one site replaced, on all inputs, so few are there."""
    changed = copy.deepcopy(model)
    replace_site(changed, site, module)
    return [(model(*inputs).clone(), changed(*inputs).clone()) for inputs in (*calibration.fit, *calibration.held_out)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Pairs], float]]] = {
    "residual, ReLU in place, BatchNorm folded, class scores": (Residual, divergence),
    "a chain with ReLU in place": (Chain, unexplained),
    "no graph of the whole": (Branching, unexplained),
    "called twice": (CalledTwice, unexplained),
    "two names": (TwoNames, unexplained),
    "nine kinds": (NineKinds, unexplained),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_effect_is_that_of_replacing_the_site_alone(
    name: str, evaluation: list[tuple[Site, nn.Module, float]]
) -> None:
    make, reference = NETWORKS[name]
    model = settled(make().double())
    before, calibration = state_bytes(model), data()
    found = surveyed(model, calibration, "channel", "separable")
    assert state_bytes(model) == before
    assert len({site.name for site, _, _ in evaluation}) == sum(bool(entry.options) for entry in found) >= 3
    for site, module, effect in evaluation:
        assert effect == pytest.approx(reference(replaced(model, site, module, calibration)), rel=1e-6, abs=1e-20)
        assert effect > 0
    told = sorted(scored.effect for entry in found for scored in entry.options if scored.measured)
    assert told == pytest.approx(sorted(effect for _, _, effect in evaluation))


def test_effects_hold_in_float32(evaluation: list[tuple[Site, nn.Module, float]]) -> None:
    model = settled(Residual())
    calibration = data(torch.float32)
    surveyed(model, calibration, "channel")
    for site, module, effect in evaluation:
        expected = divergence(replaced(model, site, module, calibration))
        assert effect == pytest.approx(expected, rel=1e-2, abs=1e-9)


def test_effects_are_measured_on_held_out_inputs_alone(evaluation: list[tuple[Site, nn.Module, float]]) -> None:
    model = settled(Residual().double())
    calibration = data()
    surveyed(model, calibration, "channel")
    on_others = replace(calibration, held_out=calibration.fit)
    for site, module, effect in evaluation:
        assert effect != pytest.approx(divergence(replaced(model, site, module, on_others)), rel=1e-3)


def test_without_held_out_inputs_effects_are_measured_on_the_others(
    evaluation: list[tuple[Site, nn.Module, float]],
) -> None:
    model = settled(Residual().double())
    calibration = replace(data(), held_out=())
    surveyed(model, calibration, "channel")
    on_fitted = replace(calibration, held_out=calibration.fit)
    for site, module, effect in evaluation:
        assert effect == pytest.approx(divergence(replaced(model, site, module, on_fitted)), rel=1e-6)


def test_weights_alone_are_measured_too(evaluation: list[tuple[Site, nn.Module, float]]) -> None:
    model = settled(Residual().double())
    calibration = replace(data(), fit=(), kind="weights only")
    surveyed(model, calibration, "channel")
    assert evaluation
    for site, module, effect in evaluation:
        assert effect == pytest.approx(divergence(replaced(model, site, module, calibration)), rel=1e-6)


# --- which options there are


def test_all_ranks_that_save_enough_may_be_chosen_and_a_few_are_fitted() -> None:
    found = surveyed(settled(Chain(12).double()), data(), "channel", require=Require(min_mac_saving=0.3))
    for entry in found:
        parts = [scored.candidate.cost.macs / entry.site.cost.macs for scored in entry.options]
        assert parts == sorted(parts)
        assert parts[-1] <= 0.7
        assert sum(scored.measured for scored in entry.options) == 2
        assert entry.options[0].measured and entry.options[-1].measured
        ranks = [scored.candidate.option.parameters["rank"] for scored in entry.options]
        assert ranks == list(range(min(ranks), max(ranks) + 1))  # type: ignore[type-var]


def test_what_two_rules_allow_alike_is_surveyed_once() -> None:
    one, two = (surveyed(settled(Chain(8).double()), data(), "channel", rules=names) for names in ("a", "ab"))
    options = [[scored.candidate.option for scored in entry.options] for entry in one]
    assert options == [[scored.candidate.option for scored in entry.options] for entry in two]
    assert any(options)


def test_errors_and_effects_of_a_rank_range_fall_with_the_rank() -> None:
    effort = Effort(ranks=4, measured=3, iterations=2)
    for entry in surveyed(settled(Chain(12).double()), data(), "channel", effort=effort):
        assert len(entry.options) > 4
        for values in ([s.error for s in entry.options], [s.effect for s in entry.options]):
            assert values[-1] < 0.7 * values[0]
            assert all(b < 1.1 * a for a, b in itertools.pairwise(values))
            assert all(math.isfinite(value) and value > 0 for value in values)


def test_a_rank_range_that_is_far_behind_is_dropped_with_the_reason() -> None:
    found = surveyed(settled(Residual(12).double()), data(), *STRUCTURES, effort=replace(QUICK, iterations=0))
    dropped = [entry for site in found for entry in site.dropped]
    assert dropped
    assert {entry.reason for entry in dropped} == {"far behind others of the same cost in a first fit"}
    for site in found:
        chosen = {scored.candidate.option for scored in site.options}
        assert site.options
        assert not chosen & {entry.candidate.option for entry in site.dropped}


def test_a_rules_error_limit_leaves_what_keeps_it() -> None:
    model, calibration = settled(Chain(12).double()), data()
    errors = [scored.error for scored in surveyed(model, calibration, "channel")[1].options]
    limit = (min(errors) + max(errors)) / 2
    entry = surveyed(model, calibration, "channel", require=Require(max_output_error=limit))[1]
    assert [scored.error for scored in entry.options] == pytest.approx([e for e in errors if e <= limit])
    assert all("exceeds" in dropped.reason for dropped in entry.dropped)
    nothing = surveyed(model, calibration, "channel", require=Require(max_output_error=1e-9))[1]
    assert nothing.options == ()
    assert nothing.reason is not None
    best = min(nothing.dropped, key=lambda one: 1.0 if one.error is None else one.error)
    assert nothing.reason.startswith(f"no option is left; the best, {best.candidate.option.describe()}, ")
    assert nothing.reason.endswith("its output error exceeds 1e-09, the rule's limit")


def test_a_site_where_no_option_saves_what_the_rule_asks_says_so() -> None:
    found = surveyed(settled(Chain(8).double()), data(), "channel", require=Require(min_mac_saving=0.999))
    assert {entry.reason for entry in found} == {"no option saves 99.9 % of its MACs, which its rule asks for"}


def test_a_site_that_no_rule_takes_keeps_its_reason() -> None:
    found = {entry.site.name: entry for entry in surveyed(settled(NineKinds().double()), data(), "asymmetric")}
    assert found["#0"].reason == "the kernel is computed from the input"
    assert (found["#0"].options, found["#0"].dropped) == ((), ())
    assert "no second axis" in str(found["pointwise"].reason)


def test_sites_are_counted_as_they_are_done_and_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, told = settled(Chain()), data(torch.float32), list[tuple[int, int]]()
    rule = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0))
    spaces = search_spaces(find_sites(model, inputs.fit[0], trace(model)), [rule], STRUCTURES)

    def progress(_stage: str, done: int, count: int, _text: str = "") -> None:
        told.append((done, count))

    work = work_of(model, inputs, search_spaces=spaces, progress=progress)
    monkeypatch.setattr(sensitivities._Surveys, "of", lambda _surveys, space: Surveyed(space.site, ()))
    monkeypatch.setattr(Site, "__eq__", lambda *_sites: pytest.fail("sites are compared"))
    survey(work, effort=QUICK, latency_table=None)
    count = sum(1 for space in spaces if space.rank_ranges)
    assert count >= 3
    assert told == [(done + after, count) for done in range(count) for after in (0, 1)]


def test_fast_measures_less(evaluation: list[tuple[Site, nn.Module, float]]) -> None:
    model, calibration = settled(Chain().double()), data()
    surveyed(model, calibration, "channel", effort=THOROUGH)
    thorough = len(evaluation)
    surveyed(model, calibration, "channel", effort=FAST)
    assert 3 * FAST.measured == len(evaluation) - thorough < thorough
    assert FAST.measured == 2, "from one rank alone nothing is known about the others"


@pytest.mark.parametrize(("count", "expected"), [(400, 100), (80, 80)])
def test_fast_lives_on_no_fewer_inputs_than_the_largest_site_needs(count: int, expected: int) -> None:
    """A patch of 720 numbers, 36 positions in an input: five for each number are in 100 inputs."""
    model = nn.Sequential(nn.Conv2d(80, 8, 3, padding=1)).eval()
    x = torch.zeros(count + 4, 80, 6, 6)
    sites = find_sites(model, (x[:1],), trace(model))
    calibration = Calibration(((x[:count],),), ((x[count:],),), "data", "a test")
    few = fewer(calibration, FAST, sites)
    assert few.fitted_on == expected
    assert fewer(calibration, FAST, ()).fitted_on == FAST.inputs == 64


def test_inputs_are_cut_where_there_are_enough_and_batches_are_never_empty() -> None:
    image = torch.zeros(1, 1, 1, 1).expand(32, 3, 200, 200)  # of 35 there are 2**22 numbers, rounded up
    few = fewer(Calibration(((image,),) * 4, ((image,),) * 4, "data", "a test"), FAST, ())
    assert [len(batch[0]) for batch in few.fit] == [32, 32]
    assert [len(batch[0]) for batch in few.held_out] == [32]
    thorough = fewer(Calibration(((image,),), ((image,),) * 4, "data", "a test"), THOROUGH, ())
    assert [len(batch[0]) for batch in thorough.held_out] == [32, 2]


class Fours(nn.Sequential):
    """Takes four images at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(4, 3, 12, 12))


def test_a_model_that_takes_so_many_at_a_time_gets_no_part_of_a_batch() -> None:
    calibration, effort = data(), replace(QUICK, iterations=0, inputs=6, examples=5)
    few = fewer(calibration, effort, (), batch=4)
    assert [len(batch[0]) for batch in (*few.fit, *few.held_out)] == [4, 4, 4, 4]
    assert fewer(calibration, replace(effort, inputs=4), (), batch=4).fitted_on == 4
    model = Fours(nn.Conv2d(3, 8, 3)).double().eval()
    [entry] = surveyed(model, calibration, "channel", effort=effort, batch=4)
    assert entry.options and all(option.effect > 0 for option in entry.options)


def test_effects_are_by_what_outputs_are_said_to_mean() -> None:
    model, batches = nn.Conv2d(3, 4, 3).eval(), ((torch.ones(2, 3, 4, 4),),)
    calibration, said = Calibration(batches, batches, "data", "a test"), {"output": Meaning("embedding", "it was said")}
    none: Any = None
    assert Evaluator.of(model, none, calibration, said).meanings == said


def test_the_outputs_of_every_batch_are_its_own() -> None:
    batches = tuple((torch.full((2, 3), float(index)),) for index in range(2))
    none: Any = None
    found = Evaluator.of(Refilling(nn.Identity()), none, Calibration((), batches, "data", "a test"), {})
    assert [outputs["output"].unique().tolist() for outputs in found.originals] == [[0.0], [1.0]]


# --- a clock that lies


def lying(slow: str, factor: float) -> Callable[[OptionGraph, Size], float]:
    """Options take what their MACs say, but those of one structure so many times the original's: ``asymmetric`` is told
    by its first kernel, which is no square."""

    def seconds(graph: OptionGraph, size: Size) -> float:
        first = graph[0][0]
        asymmetric = first.kernel_size[0] != first.kernel_size[1]
        if len(graph[0]) > 1 and asymmetric == (slow == "asymmetric"):
            return factor * 1e-9 * 12 * 12 * 9 * size[0] * size[1]
        return by_macs(graph, size)

    return seconds


@pytest.mark.parametrize("slow", ["asymmetric", "channel"])
def test_a_structure_that_is_slower_than_the_original_is_refused_with_that_reason(slow: str) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)).double())
    entry = surveyed(model, data(), "asymmetric", "channel", timer=FalseTimer(seconds=lying(slow, 1.2)))[1]
    assert {scored.candidate.option.structure for scored in entry.options} == {"asymmetric", "channel"} - {slow}
    refused = {d.reason for d in entry.dropped if d.candidate.option.structure == slow}
    assert refused == {"changes the measured time by +20%, less than the 5% it must gain"}
    assert all(d.seconds == pytest.approx(1.2 * (entry.seconds or 0)) for d in entry.dropped)

    totals = Timed(Cost(1000, 2 * entry.site.cost.macs), 2 * (entry.seconds or 0))
    allocation = allocate([entry], {"latency": 0.96}, totals)
    assert allocation.chosen[0] is not None
    assert allocation.chosen[0].candidate.option.structure != slow
    assert allocation.part("latency") <= 0.96


def test_where_everything_is_slower_the_site_is_kept_and_the_budget_refused() -> None:
    entry = surveyed(
        settled(Chain(12).double()),
        data(),
        "asymmetric",
        "channel",
        timer=FalseTimer(seconds=lambda graph, size: 1.0 if len(graph[0]) == 1 else 0.97),
    )[1]
    assert (entry.options, entry.seconds) == ((), 1.0)
    assert entry.reason is not None
    assert entry.reason.endswith("changes the measured time by -3%, less than the 5% it must gain")
    with pytest.raises(PlanError, match=r"latency=0\.9 cannot be met .* they reach latency=1\.000"):
        allocate([entry], {"latency": 0.9}, Timed(Cost(10, entry.site.cost.macs), 1.0))


def test_a_rules_own_gain_is_asked_for() -> None:
    wide = Chain(12).double()
    for entry in surveyed(settled(wide), data(), "channel", timer=FalseTimer(), require=Require(min_latency_gain=0.5)):
        assert entry.seconds is not None
        assert entry.options or entry.reason
        assert all(scored.costs.of("latency") <= 0.5 * entry.seconds for scored in entry.options)
        assert all("less than the 50% it must gain" in dropped.reason for dropped in entry.dropped)


def test_where_time_counts_ranks_fill_the_channel_blocks_or_a_part_of_the_first() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3, padding=1)).double())
    [_, entry] = surveyed(model, data(), "channel", timer=FalseTimer())
    spec, block = entry.site.folded_spec.per_group, channel_block()
    found = {int(scored.candidate.option.parameters["rank"]): scored.candidate.option for scored in entry.options}
    whole = {rank for rank, o in found.items() if aligned(STRUCTURES["channel"].stages(spec, o.parameters), block)}
    assert whole == {rank for rank in found if rank % block == 0} and len(whole) > 1
    part = found.keys() - whole
    assert part and max(part) <= block // 2 and all(rank % (block // 4) == 0 for rank in part)


def test_where_a_whole_block_costs_little_no_part_of_one_is_timed() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 256, 3, padding=1)).double())
    [_, entry] = surveyed(model, data(), "channel", timer=FalseTimer())
    ranks = [int(scored.candidate.option.parameters["rank"]) for scored in entry.options]
    assert ranks and all(rank % channel_block() == 0 for rank in ranks)


def test_where_no_rank_that_saves_fills_a_block_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, padding=1)).double())
    monkeypatch.setattr(candidates, "aligned", lambda stages, _block: all(s.out_channels % 16 == 0 for s in stages))
    [_, entry] = surveyed(model, data(), "channel", timer=FalseTimer())
    ranks = [scored.candidate.option.parameters["rank"] for scored in entry.options]
    assert ranks, "sixteen would save nothing"
    assert max(ranks) < 16  # type: ignore[type-var]


@pytest.mark.parametrize("kind", ["data", "weights only"])
def test_large_sites_get_few_fits_with_inputs_and_without(
    kind: str, evaluation: list[tuple[Site, nn.Module, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivities, "LARGE", 1)
    monkeypatch.setattr(SiteFit, "effort", lambda *_: MIN_ITERATIONS)  # its outputs are so many that fits are dear
    inputs = data()
    calibration = inputs if kind == "data" else Calibration((), inputs.held_out, "weights only", "none")
    model = settled(Chain().double())
    found = surveyed(model, calibration, "channel", "separable", effort=replace(QUICK, large_ranks=1))
    assert len(evaluation) == sum(len({o.candidate.option.structure for o in entry.options}) for entry in found) > 3
    assert all(option.error > 0 for entry in found for option in entry.options)


def test_of_a_large_site_with_cheap_fits_two_ranks_are_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivities, "LARGE", 1)
    efforts: list[int] = []
    plain = SiteFit.go_on

    def go_on(self: SiteFit, structure: Structure, option: Option, found: Fit, iterations: int) -> Fit:
        efforts.append(iterations)
        refined = plain(self, structure, option, found, iterations)
        assert refined.unexplained <= 1.01 * self.fit(structure, option, 0).unexplained
        return refined

    monkeypatch.setattr(SiteFit, "go_on", go_on)
    effort = replace(QUICK, large_ranks=1, large_variants=1, large_iterations=7)
    found = surveyed(settled(Chain().double()), data(), "channel", effort=effort)
    assert efforts == [7, 7] * len([entry for entry in found if entry.options])
    efforts.clear()
    monkeypatch.setattr(SiteFit, "effort", lambda *_: MIN_ITERATIONS)
    surveyed(settled(Chain().double()), data(), "channel", effort=effort)
    assert efforts == [], "rough fits alone where they are dear"


def test_where_a_run_takes_long_two_options_of_a_structure_are_measured(
    evaluation: list[tuple[Site, nn.Module, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "ENOUGH", 0)
    found = surveyed(settled(Chain().double()), data(), "channel", "separable")
    for entry in (entry for entry in found if entry.options):
        measured = [value for site, _, value in evaluation if site == entry.site]
        structures = {option.candidate.option.structure for option in entry.options}
        assert len(structures) <= len(measured) <= 2 * len(structures)
        assert all(option.effect > 0 for option in entry.options)


@pytest.mark.parametrize(
    ("held_out", "shape", "least", "expected"),
    [
        ([32, 32], (3, 8, 8), 64, [4, 5]),  # enough
        ([32, 8], (3, 8, 8), 64, [0, 1, 4, 5]),  # batches of those that are fitted on, too
        ([32, 8], (3, 8, 8), 32, [4, 5]),  # fewer will do
        ([4], (3, 8, 8), 1000, [0, 1, 2, 3, 4]),  # all there are
        ([4], (3, 1024, 1024), 64, [4]),  # large ones show much
        ([], (3, 8, 8), 64, [0, 1, 2, 3]),
    ],
)
def test_where_few_inputs_are_held_out_effects_are_measured_on_others_too(
    held_out: list[int], shape: tuple[int, ...], least: int, expected: list[int]
) -> None:
    one = torch.zeros(1, *shape)
    fit, held = (tuple((one.expand(count, *shape),) for count in counts) for counts in ([16] * 4, held_out))
    assert _measured_on(Calibration(fit, held, "data", "a test"), least) == expected
