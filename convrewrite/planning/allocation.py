"""One option per site: the least total effect on the outputs within budgets of MACs, parameters and seconds."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from convrewrite.conv import Cost
from convrewrite.errors import PlanError
from convrewrite.graph import Site
from convrewrite.planning.costs import Counted, Timed, seconds_of
from convrewrite.planning.curves import Dropped, Scored, Surveyed
from convrewrite.planning.knapsack import Item, choose, least
from convrewrite.rewriting import Rewritten
from convrewrite.rules import SearchSpace, Shortlist

NOT_NEEDED = "the budget is met with less harm elsewhere"

ABOUT_EQUAL = 0.1
"""How much larger, as a part of it, a plan's effect may be for the plan to be taken because it is faster: single effects are not
known more exactly than that."""

WIDEST = "balanced"
"""The built-in rule that names most structures: what it cannot reach, no other one can."""

REASONS = 3
"""A message names at most this many reasons why convolutions are kept."""

NAMED = 2
"""A message names the convolutions that are kept for one reason if they are at most this many."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """The chosen option of every site, None to keep it; the sum of their effects, and what is left of the whole model's
    ``totals``."""

    surveyed: tuple[Surveyed, ...]
    chosen: tuple[Scored | None, ...]
    totals: Counted

    @property
    def effect(self) -> float:
        """The effects of all sites added up: what the whole plan is predicted to do to the outputs."""
        return sum(scored.effect for scored in self.chosen if scored is not None)

    def part(self, resource: str) -> float:
        """What is left of a resource, as a part of the whole model's."""
        pairs = zip(self.surveyed, self.chosen, strict=True)
        saved = sum(_amount_kept(s, resource) - c.costs.of(resource) for s, c in pairs if c is not None)
        return 1 - saved / (self.totals.of(resource) or 1)  # a model may have no parameters

    def shortlists(self) -> tuple[Shortlist, ...]:
        """What is to be fitted at every site."""
        pairs = zip(self.surveyed, self.chosen, strict=True)
        return tuple(
            Shortlist(entry.site, (), entry.reason or NOT_NEEDED)
            if scored is None
            else Shortlist(entry.site, (scored.candidate,))
            for entry, scored in pairs
        )


@dataclass(frozen=True, slots=True)
class FittedPlan:
    """An allocation that was carried out, and what was measured on it: ``loss`` is the fidelity that it falls short by, or its
    effect on the outputs, depending on the constraints."""

    allocation: Allocation
    rewritten: Rewritten
    loss: float


def allocate(surveyed: Sequence[Surveyed], budget: Mapping[str, float], totals: Counted) -> Allocation:
    """The optimum, as :mod:`convrewrite.planning.knapsack` finds it.

    Raises PlanError that says what these options can reach, when they cannot meet the budget.
    """
    groups = [_items(entry, list(budget)) for entry in surveyed]
    rest = _rest(surveyed, budget, totals)
    limits = [budget[r] * totals.of(r) - other for r, other in rest.items()]
    chosen = choose(groups, limits) if all(limit >= 0 for limit in limits) else None
    if chosen is None:
        spent = zip(budget, least(groups), strict=True)
        reach = {r: max(0.0, (amount + rest[r]) / totals.of(r)) for r, amount in spent}
        stay = [(entry.site, entry.reason) for entry in surveyed if not entry.options]
        raise PlanError(unreachable(budget, reach, _rules_of(surveyed)) + _what_stays(stay, totals.of("macs")))
    return _allocation(surveyed, chosen, totals)


def fastest_of_equals(found: Allocation, budget: Mapping[str, float]) -> Allocation:
    """The fastest plan within the budget whose effect is about that of the best one; ``found`` itself where no time was
    measured."""
    surveyed, totals = found.surveyed, found.totals
    timed = all(isinstance(scored.costs, Timed) for entry in surveyed for scored in entry.options)
    if not timed or found.effect <= 0 or any(entry.seconds is None and entry.options for entry in surveyed):
        return found
    groups = [
        [Item(item.costs[-1], (*item.costs[:-1], item.effect)) for item in _items(entry, [*budget, "latency"])]
        for entry in surveyed
    ]
    limits = [budget[r] * totals.of(r) - other for r, other in _rest(surveyed, budget, totals).items()]
    chosen = choose(groups, [*limits, (1 + ABOUT_EQUAL) * found.effect])
    return found if chosen is None else _allocation(surveyed, chosen, totals)


def too_slow(dropped: Dropped, entry: Surveyed) -> bool:
    """Whether an option was left out because it takes longer than the site as it is; not one that cannot run at all."""
    return dropped.seconds is not None and entry.seconds is not None and entry.seconds < dropped.seconds < math.inf


def most_gained(surveyed: Sequence[Surveyed]) -> float:
    """Seconds that the fastest options of all sites save."""
    gains = (
        max((entry.seconds - (seconds_of(s.costs) or math.inf) for s in entry.options), default=0.0)
        for entry in surveyed
        if entry.seconds is not None
    )
    return sum(max(0.0, gain) for gain in gains)


def require_reachable(
    search_spaces: Sequence[SearchSpace], budget: Mapping[str, float], totals: Cost, rules: Collection[str] = ()
) -> None:
    """Raise PlanError for a budget of MACs or parameters that even the cheapest options miss: before any long work."""
    counted = {name: part for name, part in budget.items() if name != "latency"}
    reach = {name: 1 - _most_saved(search_spaces, name) / max(1, Counted(totals).of(name)) for name in counted}
    if any(reach[name] > part for name, part in counted.items()):
        stay = [(space.site, space.reason) for space in search_spaces]
        raise PlanError(unreachable(counted, reach, rules, measured=False) + _what_stays(stay, totals.macs))


def unreachable(
    budget: Mapping[str, float], reach: Mapping[str, float], rules: Collection[str] = (), *, measured: bool = True
) -> str:
    """The message for a budget that cannot be met: the budget, what can be reached, what to do. ``rules``: names of those in
    use. Not ``measured``: before it is known which options can be taken, so that no less can be reached, but maybe not as
    much."""
    wanted = ", ".join(f"{name}={part:g}" for name, part in budget.items())
    rounded = {name: math.ceil(1000 * part) / 1000 for name, part in reach.items()}  # up: asked for, it can be met
    found = ", ".join(f"{name}={part:.3f}" for name, part in rounded.items())
    least = f"{found} at the least{' each by itself' if len(reach) > 1 else ''}"
    saves = any(part < 1 for part in rounded.values())
    told = (
        f"they reach {least}"
        if measured or not saves
        else f"their cheapest options leave {least}, and measuring may rule some of these out"
    )
    ways = ["ask for more than that"] if saves else []
    ways += [] if WIDEST in rules else [f"add rules (--rule {WIDEST})"]
    return (
        f"budget {wanted} cannot be met by these rules on this model: {told}; "
        f"{', or '.join(ways) or 'leave this model as it is'}"
    )


def _rules_of(surveyed: Sequence[Surveyed]) -> set[str]:
    """Names of the rules that offered something."""
    candidates = [one.candidate for entry in surveyed for one in entry.options]
    candidates += [one.candidate for entry in surveyed for one in entry.dropped]
    return {candidate.rule.name for candidate in candidates}


def _what_stays(sites: Iterable[tuple[Site, str | None]], macs: float) -> str:
    """Why convolutions without an option are kept, the largest share of the MACs first; empty where all have one. A reason that
    holds for few convolutions, such as all options of one being refused, comes with their names."""
    groups: dict[str, list[Site]] = {}
    for site, reason in sites:
        if reason is not None:
            groups.setdefault(reason, []).append(site)
    if not groups:
        return ""
    shares = {reason: sum(site.cost.macs for site in found) / max(1, macs) for reason, found in groups.items()}
    most = sorted(shares, key=lambda reason: -shares[reason])[:REASONS]
    told = [f"{_named(groups[reason])}{_share(shares[reason])} of the MACs ({reason})" for reason in most]
    return "; kept: " + ", ".join(told)


def _share(part: float) -> str:
    return "less than 1 %" if 0 < part < 0.005 else f"{100 * part:.0f} %"


def _named(sites: Sequence[Site]) -> str:
    return "" if len(sites) > NAMED else f"{' and '.join(site.name for site in sites)} with "


def _most_saved(search_spaces: Sequence[SearchSpace], resource: str) -> float:
    found = 0.0
    for space in search_spaces:
        cheapest = (rank_range.at(rank_range.ranks[0]) for rank_range in space.rank_ranges)
        found += max((_saving(space.site, candidate.cost, resource) for candidate in cheapest), default=0.0)
    return found


def _saving(site: Site, cost: Cost, resource: str) -> float:
    return max(0.0, Counted(site.cost).of(resource) - Counted(cost).of(resource))


def _rest(surveyed: Sequence[Surveyed], budget: Iterable[str], totals: Counted) -> dict[str, float]:
    """What the model takes of every resource outside these sites."""
    return {r: totals.of(r) - sum(_amount_kept(entry, r) for entry in surveyed) for r in budget}


def _allocation(surveyed: Sequence[Surveyed], chosen: Sequence[int], totals: Counted) -> Allocation:
    picked = tuple(_picked(entry, index) for entry, index in zip(surveyed, chosen, strict=True))
    return Allocation(tuple(surveyed), picked, totals)


def _items(entry: Surveyed, resources: Sequence[str]) -> list[Item]:
    options = [Item(scored.effect, tuple(scored.costs.of(r) for r in resources)) for scored in entry.options]
    kept = Item(0.0, tuple(_amount_kept(entry, r) for r in resources))
    return options if entry.must_change else [kept, *options]


def _picked(entry: Surveyed, index: int) -> Scored | None:
    if entry.must_change:
        return entry.options[index]
    return None if index == 0 else entry.options[index - 1]


def _amount_kept(entry: Surveyed, resource: str) -> float:
    if resource == "latency":
        return entry.seconds or 0.0
    return Counted(entry.site.cost).of(resource)
