"""Budgets: the least effect within them, exactly; and what is said of those that cannot be met."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from networks import Residual, macs_by_hooks, settled
from torch import nn

from convrewrite.conv import Cost
from convrewrite.errors import PlanError
from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.planning.allocation import (
    NOT_NEEDED,
    Allocation,
    allocate,
    fastest_of_equals,
    most_gained,
    require_reachable,
    too_slow,
    unreachable,
)
from convrewrite.planning.costs import Counted, Timed
from convrewrite.planning.curves import Dropped, Scored, Surveyed
from convrewrite.rewriting.surgery import empty_option, replace_site
from convrewrite.rules.options import SearchSpace, search_spaces
from convrewrite.rules.schema import Protect, Rule
from convrewrite.structures.structure import Structure

X = torch.zeros(1, 3, 16, 16)
LINEAR = 32 * 5
SECONDS_PER_MAC = 1e-9


def network() -> nn.Module:
    return settled(Residual(16))


def spaces_of(structures: dict[str, Structure], **values: object) -> tuple[SearchSpace, ...]:
    model = network()
    protect = Protect(stem=True, min_channels=0, min_mac_share=0)
    names = ("separable", "asymmetric", "channel")
    rule = Rule(**{"name": "all", "structures": names, "protect": protect, **values})  # type: ignore[arg-type]
    return search_spaces(find_sites(model, (X,), trace(model)), [rule], structures)


def totals_of(spaces: tuple[SearchSpace, ...]) -> Counted:
    macs = LINEAR + sum(space.site.cost.macs for space in spaces)
    return Timed(Cost(sum(p.numel() for p in network().parameters()), macs), SECONDS_PER_MAC * macs)


def harm(site: int, structure: str, part: float) -> float:
    """An effect that nobody measured: it falls with the part of the MACs that is left, at every site differently."""
    return (1 + site) ** 2 * {"separable": 1.0, "asymmetric": 0.8, "channel": 1.3}[structure] * (1.2 - part) ** 3


def survey_of(space: SearchSpace, site: int) -> Surveyed:
    """Every rank that is cheaper than the site, with a drawn effect; chains take a little longer than their MACs say."""
    options = []
    for rank_range in space.rank_ranges:
        for candidate in (rank_range.at(rank) for rank in rank_range.ranks):
            part = candidate.cost.macs / space.site.cost.macs
            if part < 1:
                effect = harm(site, rank_range.structure.name, part)
                seconds = SECONDS_PER_MAC * (1.1 * candidate.cost.macs + 0.01 * space.site.cost.macs)
                options.append(Scored(candidate, effect, effect, False).timed(seconds))
    reason = None if options else space.reason
    return Surveyed(space.site, tuple(options), (), SECONDS_PER_MAC * space.site.cost.macs, reason)


@pytest.fixture
def surveyed(structures: dict[str, Structure]) -> tuple[tuple[Surveyed, ...], Counted]:
    spaces = spaces_of(structures)
    return tuple(survey_of(space, i) for i, space in enumerate(spaces)), totals_of(spaces)


def within(allocation: Allocation, budget: Mapping[str, float]) -> bool:
    return all(allocation.part(name) <= part * (1 + 1e-9) for name, part in budget.items())


BUDGETS = [
    {"macs": 0.3}, {"macs": 0.5}, {"macs": 0.77}, {"macs": 0.95}, {"params": 0.4}, {"params": 0.7},
    {"latency": 0.4}, {"latency": 0.8}, {"macs": 0.6, "params": 0.45}, {"macs": 0.5, "params": 0.5, "latency": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_what_is_reached_is_within_two_percent_of_what_was_asked(
    surveyed: tuple[tuple[Surveyed, ...], Counted], budget: dict[str, float]
) -> None:
    allocation = allocate(surveyed[0], budget, surveyed[1])
    assert within(allocation, budget)
    assert max(allocation.part(name) / part for name, part in budget.items()) >= 0.98


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_no_other_choice_does_less_harm(
    surveyed: tuple[tuple[Surveyed, ...], Counted], budget: dict[str, float]
) -> None:
    entries = [replace(entry, options=entry.options[:: max(1, len(entry.options) // 4)]) for entry in surveyed[0]]
    totals = surveyed[1]
    choices = itertools.product(*((None, *entry.options) for entry in entries))
    allowed = [found for c in choices if within(found := Allocation(tuple(entries), c, totals), budget)]
    allocation = allocate(entries, budget, totals)
    assert within(allocation, budget)
    assert allocation.effect == pytest.approx(min(found.effect for found in allowed), rel=1e-9)


@pytest.mark.parametrize("budget", [{"macs": 0.4}, {"params": 0.5}], ids=str)
def test_the_promised_parts_are_those_of_the_model_that_is_built(
    surveyed: tuple[tuple[Surveyed, ...], Counted], budget: dict[str, float], structures: dict[str, Structure]
) -> None:
    allocation = allocate(surveyed[0], budget, surveyed[1])
    model, built = network(), network()
    for shortlist in allocation.shortlists():
        for candidate in shortlist.candidates:
            option = candidate.option
            stages = structures[option.structure].stages(shortlist.site.folded_spec.per_group, option.parameters)
            replace_site(built, shortlist.site, empty_option(shortlist.site.folded_spec, stages, option, X))
    macs = (macs_by_hooks(built, X) + LINEAR) / (macs_by_hooks(model, X) + LINEAR)
    counts = [sum(p.numel() for p in net.parameters()) for net in (built, model)]
    assert allocation.part("macs") == pytest.approx(macs)
    assert allocation.part("params") == pytest.approx(counts[0] / counts[1])


def test_a_larger_budget_leaves_more_and_harms_less(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    found = [allocate(surveyed[0], {"macs": part}, surveyed[1]) for part in (0.25, 0.4, 0.6, 0.8, 0.999)]
    assert [a.part("macs") for a in found] == sorted(a.part("macs") for a in found)
    assert [a.effect for a in found] == sorted((a.effect for a in found), reverse=True)


def test_without_a_budget_everything_is_kept(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    allocation = allocate(surveyed[0], {}, surveyed[1])
    assert allocation.chosen == (None,) * len(surveyed[0])
    assert allocation.effect == 0
    assert [allocation.part(name) for name in ("macs", "params", "latency")] == [1, 1, 1]


def test_what_is_not_needed_is_kept_with_that_reason(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    allocation = allocate(surveyed[0], {"macs": 0.8}, surveyed[1])
    shortlists = allocation.shortlists()
    assert [shortlist.site for shortlist in shortlists] == [entry.site for entry in surveyed[0]]
    assert shortlists[0].reason == "it is the stem, the first convolution the network runs"
    told = {shortlist.reason for shortlist, chosen in zip(shortlists, allocation.chosen, strict=True) if chosen is None}
    assert NOT_NEEDED in told
    for shortlist, chosen in zip(shortlists, allocation.chosen, strict=True):
        assert shortlist.candidates == (() if chosen is None else (chosen.candidate,))
        assert (shortlist.reason is None) == (chosen is not None)


def test_a_site_that_must_change_is_not_kept(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    entries = [replace(entry, must_change=bool(entry.options)) for entry in surveyed[0]]
    allocation = allocate(entries, {"macs": 0.999}, surveyed[1])
    for entry, chosen in zip(entries, allocation.chosen, strict=True):
        least = min((scored.effect for scored in entry.options), default=None)
        assert (chosen and chosen.effect) == least


# --- budgets that cannot be met


@pytest.mark.parametrize("name", ["macs", "params", "latency"])
def test_an_impossible_budget_says_what_can_be_reached(
    surveyed: tuple[tuple[Surveyed, ...], Counted], name: str
) -> None:
    with pytest.raises(PlanError, match=rf"budget {name}=0\.01 cannot be met .* they reach {name}=0\.\d+ at") as caught:
        allocate(surveyed[0], {name: 0.01}, surveyed[1])
    reached = float(str(caught.value).partition(f"they reach {name}=")[2].split()[0])
    allocation = allocate(surveyed[0], {name: reached + 0.001}, surveyed[1])
    assert allocation.part(name) == pytest.approx(reached, abs=0.0015)
    with pytest.raises(PlanError, match="cannot be met"):
        allocate(surveyed[0], {name: reached - 0.001}, surveyed[1])


def test_budgets_that_exclude_each_other_are_told_one_by_one(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    # Of every site the one option that saves MACs costs parameters, and the other way round.
    def only(entry: Surveyed) -> Surveyed:
        kept, two = entry.site.cost, entry.options[:2]
        costs = (Cost(kept.parameters, kept.macs // 4), Cost(kept.parameters // 4, kept.macs))
        pairs = zip(two, costs, strict=False)
        return replace(entry, options=tuple(replace(s, candidate=replace(s.candidate, cost=c)) for s, c in pairs))

    entries = [only(entry) for entry in surveyed[0]]
    assert within(allocate(entries, {"macs": 0.4}, surveyed[1]), {"macs": 0.4})
    assert within(allocate(entries, {"params": 0.4}, surveyed[1]), {"params": 0.4})
    with pytest.raises(PlanError, match=r"they reach macs=0\.\d+, params=0\.\d+ at the least each by itself; ask for"):
        allocate(entries, {"macs": 0.4, "params": 0.4}, surveyed[1])


def test_a_budget_without_any_option_is_impossible(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    with pytest.raises(PlanError, match=r"they reach macs=1\.000"):
        allocate([replace(entry, options=()) for entry in surveyed[0]], {"macs": 0.9}, surveyed[1])
    with pytest.raises(PlanError, match=r"they reach macs=1\.000"):
        require_reachable([], {"macs": 0.9}, surveyed[1].cost)
    with pytest.raises(PlanError, match=r"macs=1\.000 at the least; add rules \(--rule balanced\)"):
        require_reachable([], {"macs": 0.9}, surveyed[1].cost, ["separable"])
    with pytest.raises(PlanError, match=r"macs=1\.000 at the least; leave this model as it is$"):
        require_reachable([], {"macs": 0.9}, surveyed[1].cost, ["balanced"])


def test_sites_whose_options_were_refused_are_named(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    first, second, *others = [entry for entry in surveyed[0] if entry.options]
    gone = [replace(first, options=(), reason="no option is left"), replace(second, options=(), reason="it is odd")]
    entries = [*gone, *others, *(entry for entry in surveyed[0] if not entry.options)]
    share = {entry.site.name: 100 * entry.site.cost.macs / surveyed[1].of("macs") for entry in gone}
    with pytest.raises(PlanError) as caught:
        allocate(entries, {"macs": 0.01}, surveyed[1])
    for entry in gone:
        assert f"{entry.site.name} with {share[entry.site.name]:.0f} % of the MACs ({entry.reason})" in str(
            caught.value
        )


def test_what_is_said_to_be_reached_can_be_asked_for(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    with pytest.raises(PlanError, match=r"they reach macs=0\.\d+ at the least; ask") as caught:
        allocate(surveyed[0], {"macs": 0.001}, surveyed[1])
    reached = float(str(caught.value).partition("they reach macs=")[2].split()[0])
    assert within(allocate(surveyed[0], {"macs": reached}, surveyed[1]), {"macs": reached})
    assert "latency=0.057 at the least" in unreachable({"latency": 0.01}, {"latency": 0.0561})


def test_what_is_no_site_can_rule_a_budget_out(surveyed: tuple[tuple[Surveyed, ...], Counted]) -> None:
    heavy = Counted(
        Cost(surveyed[1].cost.parameters * 5, surveyed[1].cost.macs)
    )  # four fifths of them in linear layers
    with pytest.raises(PlanError, match=r"params=0\.5 cannot be met .* they reach params=0\.8\d+"):
        allocate(surveyed[0], {"params": 0.5}, heavy)


@pytest.mark.parametrize("name", ["macs", "params"])
def test_it_is_known_before_the_long_work_what_counting_can_tell(name: str, structures: dict[str, Structure]) -> None:
    spaces = spaces_of(structures)
    totals = totals_of(spaces).cost
    with pytest.raises(PlanError, match=rf"{name}=0\.01 cannot be met .* their cheapest options leave") as caught:
        require_reachable(spaces, {name: 0.01, "latency": 0.001}, totals)
    reached = float(str(caught.value).partition(f"options leave {name}=")[2].split()[0])
    saved = sum(
        max((getattr(m.site.cost, "macs" if name == "macs" else "parameters") - getattr(
            rank_range.at(rank).cost, "macs" if name == "macs" else "parameters"
        ) for rank_range in m.rank_ranges for rank in rank_range.ranks), default=0)
        for m in spaces
    )  # fmt: skip
    assert reached == pytest.approx(1 - saved / (totals.macs if name == "macs" else totals.parameters), abs=0.001)
    require_reachable(spaces, {name: reached}, totals)
    assert "at the least, and measuring may rule some of these out; ask for more" in str(caught.value)
    require_reachable(spaces, {"latency": 0.001}, totals)


@pytest.mark.parametrize("names", [("macs",), ("params",), ("macs", "params")])
def test_a_budget_of_just_what_can_be_reached_is_taken(
    names: tuple[str, ...], structures: dict[str, Structure]
) -> None:
    spaces, totals = spaces_of(structures), Counted(totals_of(spaces_of(structures)).cost)
    reach = {}
    for name in names:
        cheapest = [
            max(0.0, Counted(space.site.cost).of(name) - min(Counted(r.at(r.ranks[0]).cost).of(name) for r in space.rank_ranges))
            for space in spaces if space.rank_ranges
        ]  # fmt: skip
        reach[name] = 1 - sum(cheapest) / totals.of(name)
    require_reachable(spaces, reach, totals.cost)
    for name in names:
        with pytest.raises(PlanError) as caught:
            require_reachable(spaces, reach | {name: 0.999 * reach[name]}, totals.cost)
        assert (" each by itself," in str(caught.value)) == (len(names) > 1)


def test_what_time_can_be_gained_is_that_of_the_fastest_options(
    surveyed: tuple[tuple[Surveyed, ...], Counted],
) -> None:
    entries = surveyed[0]
    fastest = [min((o.costs.of("latency") for o in e.options), default=e.seconds or 0.0) for e in entries]
    gains = [max(0.0, (e.seconds or 0.0) - least) for e, least in zip(entries, fastest, strict=True)]
    assert most_gained(entries) == pytest.approx(sum(gains))
    assert sum(gains) > 0
    untimed = [replace(entry, seconds=None) for entry in entries[:1]]
    assert most_gained([*untimed, *entries[1:]]) == pytest.approx(sum(gains[1:]))
    slower = [replace(entry, seconds=0.0) for entry in entries]
    assert most_gained(slower) == 0


@pytest.mark.parametrize(
    ("option", "site", "slow"),
    [(2.0, 1.0, True), (1.0, 1.0, False), (math.inf, 1.0, False), (None, 1.0, False), (2.0, None, False)],
)
def test_an_option_is_too_slow_if_it_takes_longer_than_the_site_itself(
    surveyed: tuple[tuple[Surveyed, ...], Counted], option: float | None, site: float | None, slow: bool
) -> None:
    entry = next(entry for entry in surveyed[0] if entry.options)
    dropped = Dropped(entry.options[0].candidate, None, "it is slow", option)
    assert too_slow(dropped, replace(entry, seconds=site)) is slow


def test_a_budget_out_of_reach_says_what_is_kept_and_why(structures: dict[str, Structure]) -> None:
    spaces = spaces_of(structures)
    kept = [replace(space, rank_ranges=(), reason="it is too old") for space in spaces]
    share = sum(space.site.cost.macs for space in spaces) / totals_of(spaces).cost.macs
    with pytest.raises(PlanError, match=rf"(?m); kept: {100 * share:.0f} % of the MACs \(it is too old\)$"):
        require_reachable(kept, {"macs": 0.01}, totals_of(spaces).cost)
    with pytest.raises(PlanError, match=r"(?m); kept: less than 1 % of the MACs \(it is too old\)$"):
        require_reachable(kept, {"macs": 0.01}, replace(totals_of(spaces).cost, macs=10**12))


def test_a_budget_out_of_reach_of_the_widest_rule_is_not_told_to_add_it(structures: dict[str, Structure]) -> None:
    spaces = spaces_of(structures)
    for rules, more in (((), ", or add rules (--rule balanced)"), (("balanced",), "")):
        with pytest.raises(PlanError, match=f"ask for more than that{re.escape(more)}(;|$)"):
            require_reachable(spaces, {"macs": 0.01}, totals_of(spaces).cost, rules)


def test_a_rule_whose_ranks_are_out_of_range_saves_nothing(structures: dict[str, Structure]) -> None:
    names = ("separable", "asymmetric", "channel")
    spaces = spaces_of(structures, parameters={name: {"rank": (10_000,)} for name in names})
    with pytest.raises(PlanError, match=r"they reach macs=1\.000"):
        require_reachable(spaces, {"macs": 0.5}, totals_of(spaces).cost)


def test_of_plans_with_about_equal_effect_the_fastest_is_taken(
    surveyed: tuple[tuple[Surveyed, ...], Counted],
) -> None:
    entries = tuple(
        replace(entry, options=tuple(o for s in entry.options for o in (s, slower_twin(s)))) for entry in surveyed[0]
    )
    best = allocate(entries, {"macs": 0.5}, surveyed[1])
    found = fastest_of_equals(best, {"macs": 0.5})
    assert found.part("macs") <= 0.5
    assert found.effect <= 1.1 * best.effect
    assert found.part("latency") < best.part("latency")


def slower_twin(scored: Scored) -> Scored:
    """The same at twice the seconds, which does a hundredth less harm."""
    return Scored(scored.candidate, scored.error, 0.99 * scored.effect, False).timed(2 * scored.costs.of("latency"))
