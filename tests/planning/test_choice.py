"""Which option every site gets, and that what was chosen is what is fitted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clocks import FalseTimer, by_macs, macs_of
from networks import Residual, natural, settled
from torch import nn

from convrewrite.calibration.batches import Calibration
from convrewrite.conv import Size
from convrewrite.errors import PlanError
from convrewrite.meanings.evaluation import Evaluation
from convrewrite.meanings.kinds import tell
from convrewrite.pipeline.prepare import prepare
from convrewrite.planning.choice import Planner, latency_table_of
from convrewrite.planning.curves import Scored, Surveyed
from convrewrite.progress import Stopwatch, silent
from convrewrite.rewriting.work import Prepared, Work
from convrewrite.rules.schema import Protect, Require, Rule
from convrewrite.runtime.exporting import TorchExporter
from convrewrite.runtime.onnx_export import Exported
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.timing import Baseline, Unmeasured
from convrewrite.settings import Constraints, Keep, Settings

RULE = Rule(
    name="r", structures=("channel",), ratio=0.6, protect=Protect(min_channels=0, min_mac_share=0),
    require=Require(min_latency_gain=0.05),
)  # fmt: skip
FAST = Settings(memory=1 << 30, fast=True)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    return prepare(settled(Residual()), (torch.zeros(1, 3, 8, 8),), [RULE])


def planner(prepared: Prepared, settings: Settings = FAST, **asked: object) -> Planner:
    inputs = tuple((part,) for part in natural(24, 3, 8, 8, torch.float32).split(8))
    data = Calibration(inputs[:2], inputs[2:], "data", "a test")
    evaluation = Evaluation(inputs[2:], "a test", meanings=tell(prepared.model, inputs[2:]))
    work = Work(prepared, data, evaluation, {}, settings, silent, Stopwatch())
    return Planner(Constraints(**{"budget": {}} | asked), work, Unmeasured())  # type: ignore[arg-type]


def test_without_a_budget_every_site_gets_its_rules_own_ratio(prepared: Prepared) -> None:
    choice = planner(prepared, replace(FAST, measure=False)).choose()
    assert choice.allocation is None
    found = {o.site.name: [c.cost.macs / o.site.cost.macs for c in o.candidates] for o in choice.shortlists}
    assert found["stem"] == []
    assert all(0.4 < part <= 0.6 for parts in found.values() for part in parts)
    assert sum(map(len, found.values())) >= 4


def test_where_time_is_measured_options_that_are_slower_are_left_out(prepared: Prepared) -> None:
    def seconds(graph: OptionGraph, size: Size) -> float:
        return by_macs(graph, size) if sum(map(len, graph)) == 1 else 2.0

    timer = FalseTimer(seconds=seconds)
    choice = planner(prepared, replace(FAST, timer=timer)).choose()
    assert timer.asked
    assert all(shortlist.candidates == () for shortlist in choice.shortlists)
    assert any("no option is fast enough" in (shortlist.reason or "") for shortlist in choice.shortlists)


def test_a_budget_is_kept_and_what_was_chosen_is_what_is_fitted(prepared: Prepared) -> None:
    asked = planner(prepared, replace(FAST, measure=False), budget={"macs": 0.7})
    choice = asked.choose()
    assert choice.allocation is not None
    assert choice.allocation.part("macs") <= 0.7
    rewritten, allocation = asked.fit(choice)
    assert allocation == choice.allocation, "--fast betters nothing"
    chosen = {o.site.name: o.candidates[0].option for o in choice.shortlists if o.candidates}
    assert {o.site.name: o.candidate.option for o in rewritten.outcomes if o.candidate is not None} == chosen
    assert {name for name, module in rewritten.model.named_modules() if isinstance(module, nn.Sequential)} >= set(
        chosen
    )


def test_a_plan_says_what_was_asked_and_what_every_site_becomes(prepared: Prepared) -> None:
    asked = planner(prepared, replace(FAST, measure=False), budget={"macs": 0.7})
    choice = asked.choose()
    plan = asked.plan(choice)
    assert plan.budget == {"macs": 0.7}
    assert [site.name for site in plan.sites] == [shortlist.site.name for shortlist in choice.shortlists]
    assert plan.predicted is not None
    assert plan.predicted.macs == choice.allocation.part("macs")  # type: ignore[union-attr]
    assert all((site.option is None) == (site.reason is not None) for site in plan.sites)


def test_of_a_survey_for_several_budgets_a_choice_takes_what_its_own_budget_allows() -> None:
    rule = Rule(name="r", structures=("channel",), protect=Protect(min_channels=0, min_mac_share=0))
    shared = prepare(settled(Residual(16)), (torch.zeros(1, 3, 8, 8),), [rule], left=0.05)
    survey = tuple(
        Surveyed(
            space.site, tuple(Scored(r.at(1), 0.1, 1.0 + i, False) for r in space.rank_ranges), reason=space.reason
        )
        for i, space in enumerate(shared.search_spaces)
    )
    stem = shared.sites[0]
    part = 1 - (stem.cost.macs - shared.search_spaces[0].rank_ranges[0].at(1).cost.macs) / shared.totals.macs
    asked = replace(planner(shared, replace(FAST, measure=False), budget={"macs": part}), surveyed=survey)
    kept, *others = asked.choose().shortlists
    assert (kept.site, kept.candidates) == (stem, ())
    assert kept.reason is not None and kept.reason.startswith("it is the stem, the first convolution the network runs;")
    assert any(shortlist.candidates for shortlist in others)


def test_a_fidelity_to_keep_is_found_by_fitting_and_is_not_fitted_again(prepared: Prepared) -> None:
    asked = planner(prepared, replace(FAST, measure=False), keep=Keep("error", 0.5))
    choice = asked.choose()
    assert choice.fitted is not None
    rewritten, allocation = asked.fit(choice)
    assert rewritten is choice.fitted.rewritten
    assert allocation == choice.allocation


def test_a_budget_that_no_rule_reaches_is_refused_before_the_long_work(prepared: Prepared) -> None:
    asked = planner(prepared, replace(FAST, measure=False), budget={"macs": 0.01})
    with pytest.raises(PlanError, match=r"budget macs=0\.01 cannot be met"):
        asked.choose()
    assert asked.work.watch.seconds == {}


def test_a_latency_needs_what_is_measured(prepared: Prepared) -> None:
    with pytest.raises(PlanError, match="needs measured times"):
        planner(prepared, replace(FAST, timer=FalseTimer()), budget={"latency": 0.7}).choose()


def test_what_the_options_save_is_what_the_timer_says_of_them(prepared: Prepared, tmp_path: Path) -> None:
    timer = FalseTimer(file_seconds=0.25)
    asked = planner(prepared, replace(FAST, timer=timer), budget={"macs": 0.7})
    original = Exported(tmp_path / "original.onnx", True)
    baseline = Baseline(original, prepared.inputs, tmp_path, timer, 1, TorchExporter())
    asked = replace(asked, baseline=baseline)
    rewritten, _ = asked.fit(asked.choose())
    changed = [(o.site, o.candidate) for o in rewritten.outcomes if o.candidate is not None]
    saved = sum(1e-9 * (site.cost.macs - candidate.cost.macs) for site, candidate in changed)
    assert asked.predicted_saving(rewritten.outcomes) == pytest.approx(saved / timer.file_seconds)
    assert max(macs_of(graph, (8, 8)) for graph in timer.asked) > 0


def test_a_quick_plan_times_each_option_in_fewer_rounds(prepared: Prepared) -> None:
    fast, thorough = (latency_table_of(prepared, replace(FAST, fast=fast)) for fast in (True, False))
    assert fast.rounds < thorough.rounds
    assert fast.timer == FAST.clock.steady()


def test_where_slow_options_were_left_out_only_what_would_help_is_named(prepared: Prepared, tmp_path: Path) -> None:
    timer = FalseTimer(file_seconds=1.0)
    baseline = Baseline(Exported(tmp_path / "o.onnx", True), prepared.inputs, tmp_path, timer, 1, TorchExporter())
    space = next(space for space in prepared.search_spaces if space.rank_ranges)
    halved = Scored(space.rank_ranges[0].at(1), 0.1, 0.1, measured=True).timed(0.5)
    gaining = [Surveyed(space.site, (halved,), seconds=1.0)]
    here, elsewhere = (
        replace(planner(prepared, settings), baseline=baseline) for settings in (FAST, replace(FAST, timings="t.json"))
    )
    assert here._ways_out(gaining) == ["--any-speed takes them too", "--budget latency=0.55 would make it faster"]
    assert here._ways_out([]) == ["--any-speed takes them too"]
    assert elsewhere._ways_out(gaining) == ["--budget latency=0.55 would make it faster"]
    assert elsewhere._ways_out([]) == []
    twice = [Surveyed(space.site, (halved,), seconds=3.0)]  # more than the whole takes
    assert elsewhere._ways_out(twice) == ["--budget latency=0.05 would make it faster"]
