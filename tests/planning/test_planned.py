"""What a plan tells of its choice: what was measured, what was chosen, what was refused and why, and what it promises."""

from dataclasses import replace

import pytest
import torch
from clocks import FalseTimer, macs_of
from networks import Residual, natural, settled
from torch import Tensor, nn

import convrewrite
from convrewrite.conv import Size
from convrewrite.errors import PlanError
from convrewrite.pipeline.prepare import prepare
from convrewrite.planning.allocation import Allocation
from convrewrite.planning.costs import Counted, Timed
from convrewrite.planning.curves import Dropped, Scored, Surveyed
from convrewrite.planning.plan import Fingerprint, PlannedOption
from convrewrite.planning.planned import make_plan, with_kept
from convrewrite.rewriting.work import Prepared
from convrewrite.rules.options import Candidate
from convrewrite.rules.schema import Protect, Rule
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.settings import Constraints, Keep, Settings

FREE = Protect(stem=True, min_channels=0, min_mac_share=0)
RULE = Rule(name="mine", structures=("channel", "separable"), protect=FREE)


def network() -> nn.Module:
    torch.manual_seed(0)
    return settled(Residual(16))


def images() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return natural(24, 3, 12, 12, torch.float32)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    return prepare(network(), (images()[:1],), [RULE])


def scored(prepared: Prepared, index: int, rank: int, measured: bool, rank_range: int = 0) -> Scored:
    """An option of a site with invented figures; its error is 0.01 times its rank."""
    candidate = prepared.search_spaces[index].rank_ranges[rank_range].at(rank)
    return Scored(candidate, 0.01 * rank, 0.001 * rank, measured).timed(1e-6 * rank)


@pytest.fixture
def allocation(prepared: Prepared) -> Allocation:
    """The stem is refused, the next site gets rank 4, the others are kept; the only one of rank 7 was dropped."""
    entries = [Surveyed(space.site, (), (), 2e-5, space.reason) for space in prepared.search_spaces]
    options = tuple(scored(prepared, 1, rank, rank in (2, 6)) for rank in (6, 2, 3, 4))
    dropped = Dropped(scored(prepared, 1, 7, False).candidate, None, "too slow", 3e-5)
    wrong = Dropped(scored(prepared, 1, 1, False).candidate, 0.25, "too wrong")
    entries[1] = replace(entries[1], options=options, dropped=(dropped, wrong))
    chosen = [None] * len(entries)
    return Allocation(
        tuple(entries), (None, options[3], *chosen[2:]), Timed(prepared.totals, 1e-4)
    )  # fmt: skip


def choice_of(allocation: Allocation) -> list[tuple[object, Candidate | None, str | None]]:
    return [
        (shortlist.site, shortlist.candidates[0] if shortlist.candidates else None, shortlist.reason)
        for shortlist in allocation.shortlists()
    ]


def test_a_plan_says_what_was_asked_and_of_which_model(prepared: Prepared, allocation: Allocation) -> None:
    constraints = Constraints({"macs": 0.5}, Keep("agreement", 0.98))
    made = make_plan(prepared, constraints, Settings(seed=7), "9.9", choice_of(allocation), allocation)  # type: ignore[arg-type]
    assert made.asked() == constraints
    assert (made.tool_version, made.seed, made.rules) == ("9.9", 7, ("mine",))
    assert made.model == Fingerprint.of(network())
    assert [site.name for site in made.sites] == [site.name for site in prepared.sites]
    assert made.lifted == ()


def test_a_site_shows_the_measured_the_chosen_and_the_dropped(prepared: Prepared, allocation: Allocation) -> None:
    made = make_plan(prepared, Constraints({"macs": 0.5}), Settings(), "", choice_of(allocation), allocation)  # type: ignore[arg-type]
    stem, site, kept = made.sites[:3]
    assert (stem.option, stem.reason) == (None, "it is the stem, the first convolution the network runs")
    assert stem.considered == ()
    ranks = [entry.option.parameters["rank"] for entry in site.considered]
    assert ranks == [2, 4, 6, 7, 1], "measured or chosen, cheap to dear; then what was dropped; 3 was neither"
    assert [entry.effect for entry in site.considered] == [0.002, 0.004, 0.006, None, None]
    assert [entry.error for entry in site.considered] == pytest.approx([0.02, 0.04, 0.06, None, 0.25])
    assert [entry.reason for entry in site.considered] == [None, None, None, "too slow", "too wrong"]
    assert [entry.seconds for entry in site.considered] == pytest.approx([2e-6, 4e-6, 6e-6, 3e-5, None])
    macs = [prepared.search_spaces[1].rank_ranges[0].at(int(rank)).cost.macs for rank in ranks]
    assert [entry.macs for entry in site.considered] == macs
    assert site.option == site.considered[1].option
    assert (site.macs, site.parameters, site.seconds) == (
        prepared.sites[1].cost.macs, prepared.sites[1].cost.parameters, 2e-5
    )  # fmt: skip
    assert site.batch_norm == "blocks.0.bn1"
    assert (kept.batch_norm, kept.option) == (None, None)
    assert kept.reason == "the budget is met with less harm elsewhere"


def test_a_kept_site_shows_the_measured_and_the_dropped(prepared: Prepared, allocation: Allocation) -> None:
    none = replace(allocation, chosen=(None,) * len(allocation.chosen))
    made = make_plan(prepared, Constraints({"macs": 0.5}), Settings(), "", choice_of(none), none)  # type: ignore[arg-type]
    assert [entry.option.parameters["rank"] for entry in made.sites[1].considered] == [2, 6, 7, 1]


def test_a_site_that_has_to_be_kept_after_all_says_why(prepared: Prepared, allocation: Allocation) -> None:
    made = make_plan(prepared, Constraints({"macs": 0.5}), Settings(), "", choice_of(allocation), allocation)  # type: ignore[arg-type]
    stem, site, *others = made.sites
    kept = with_kept(made, {stem.name: "no fit", site.name: "no fit"})
    assert kept.sites == (stem, kept.sites[1], *others), "what the plan keeps has its own reason"
    assert (kept.sites[1].option, kept.sites[1].batch_norm, kept.sites[1].reason) == (None, None, "no fit")
    assert kept.sites[1].considered == site.considered
    assert with_kept(made, {stem.name: "no fit"}) == made


def test_a_chosen_option_is_shown_in_the_lowering_it_got(prepared: Prepared, allocation: Allocation) -> None:
    branches = scored(prepared, 1, 3, False, rank_range=1)
    assert branches.candidate.option.lowering == "branches"
    chain = replace(branches.candidate, option=replace(branches.candidate.option, lowering="chain"))
    entries = list(allocation.surveyed)
    entries[1] = replace(entries[1], options=(*entries[1].options, branches))
    moved = replace(allocation, surveyed=tuple(entries), chosen=(None, branches, *allocation.chosen[2:]))
    choice = choice_of(moved)
    choice[1] = (choice[1][0], chain, None)
    made = make_plan(prepared, Constraints({"macs": 0.5}), Settings(), "", choice, moved)  # type: ignore[arg-type]
    assert made.sites[1].option == PlannedOption.of(chain.option)
    assert sum(entry.option == made.sites[1].option for entry in made.sites[1].considered) == 1
    assert "branches" not in {entry.option.lowering for entry in made.sites[1].considered}


def test_a_plan_promises_what_its_parts_add_up_to(prepared: Prepared, allocation: Allocation) -> None:
    made = make_plan(prepared, Constraints({"macs": 0.5}), Settings(), "", choice_of(allocation), allocation)  # type: ignore[arg-type]
    site, candidate = prepared.sites[1], prepared.search_spaces[1].rank_ranges[0].at(4)
    assert made.predicted is not None
    assert made.predicted.effect == 0.004
    saved = site.cost.macs - candidate.cost.macs
    assert made.predicted.macs == pytest.approx(1 - saved / prepared.totals.macs)
    fewer = site.cost.parameters - candidate.cost.parameters
    assert made.predicted.params == pytest.approx(1 - fewer / prepared.totals.parameters)
    assert made.predicted.latency == pytest.approx(1 - (2e-5 - 4e-6) / 1e-4)
    untimed = replace(allocation, totals=Counted(prepared.totals))
    made = make_plan(prepared, Constraints({"macs": 0.5}), Settings(), "", choice_of(untimed), untimed)  # type: ignore[arg-type]
    assert made.predicted is not None
    assert made.predicted.latency is None


def test_options_that_save_more_than_the_whole_time_promise_no_latency(
    prepared: Prepared, allocation: Allocation
) -> None:
    brief = replace(allocation, totals=Timed(prepared.totals, 1e-12))
    assert brief.part("latency") < 0
    made = make_plan(prepared, Constraints({"latency": 0.5}), Settings(), "", choice_of(brief), brief)  # type: ignore[arg-type]
    assert made.predicted is not None and made.predicted.latency is None


def test_a_plan_by_ratio_promises_nothing_and_shows_its_costs() -> None:
    made = convrewrite.plan(network(), images()[:1], [RULE], "weights", measure=False)
    assert made.predicted is None
    rewritten = [site for site in made.sites if site.option]
    assert rewritten
    for site in rewritten:
        [entry] = site.considered
        assert entry.option == site.option
        assert site.macs is not None
        assert entry.macs <= 0.5 * site.macs
        assert (entry.error, entry.effect, entry.seconds) == (None, None, None)
    assert all(site.considered == () for site in made.sites if not site.option)


# --- a clock that lies, from the timer to the plan


@pytest.mark.parametrize("slow", ["separable", "channel"])
def test_an_option_that_is_slower_is_refused_by_the_plan_with_that_reason(
    slow: str,
) -> None:
    def seconds(graph: OptionGraph, size: Size) -> float:
        depthwise = any(spec.groups > 1 for spec in graph[0])
        is_slow = len(graph[0]) > 1 and depthwise == (slow == "separable")
        return 1e-6 * size[0] if len(graph[0]) == 1 else 1.3e-6 * size[0] if is_slow else 1e-12 * macs_of(graph, size)

    timer = FalseTimer(0.79, seconds, file_seconds=50e-6)
    made = convrewrite.plan(network(), images()[:1], [RULE], images(), {"latency": 0.8}, fast=True, timer=timer)
    assert made.predicted is not None
    assert made.predicted.latency is not None
    assert made.predicted.latency <= 0.8
    chosen = [site for site in made.sites if site.option]
    assert chosen
    assert {site.option.structure for site in chosen if site.option} == {"channel", "separable"} - {slow}
    for site in chosen:
        refused = [entry for entry in site.considered if entry.option.structure == slow]
        assert refused
        assert {entry.reason for entry in refused} == {
            "changes the measured time by +30%, less than the 5% it must gain"
        }
        assert all(entry.seconds == pytest.approx(1.3 * (site.seconds or 0)) for entry in refused)


def test_where_every_option_is_slower_no_latency_can_be_saved() -> None:
    timer = FalseTimer(
        seconds=lambda graph, size: (1e-6 if len(graph[0]) == 1 else 1.1e-6) * size[0], file_seconds=50e-6
    )
    with pytest.raises(PlanError, match=r"budget latency=0\.8 cannot be met .* they reach latency=1\.000 at the least"):
        convrewrite.plan(network(), images()[:1], [RULE], images(), {"latency": 0.8}, fast=True, timer=timer)
