"""Which options each site has under the rules, and why a site has none.

An option's costs are counted from the shapes of what would be built. Nothing here looks at weights or runs anything.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from convrewrite.conv import Cost
from convrewrite.errors import RuleFileError
from convrewrite.rules import Candidate, Rule
from convrewrite.sites import Site
from convrewrite.structure import Option, Setting, Structure, allowed_ranks, allowed_variants, make_option, option_cost


@dataclass(frozen=True, slots=True)
class Proposal:
    """An option at a site, with its cost and the rule that offers it."""

    option: Option
    cost: Cost
    rule: Rule


@dataclass(frozen=True, slots=True)
class Ladder:
    """One variant of one structure at one site, rank by rank from cheap to costly. Costs are counted when asked for."""

    site: Site
    rule: Rule
    structure: Structure
    variant: Setting
    ranks: Sequence[int]
    _known: dict[int, Proposal] = field(default_factory=dict, repr=False)

    def at(self, rank: int) -> Proposal:
        """The proposal of this rank."""
        if rank not in self._known:
            option = make_option(self.structure, self.site.folded_spec, {**self.variant, "rank": rank})
            self._known[rank] = Proposal(option, cost_of(self.site, option, self.structure), self.rule)
        return self._known[rank]

    def largest_within(self, macs: float) -> Proposal | None:
        """The proposal of the largest rank that costs at most so many MACs; None when even the first costs more."""
        count = bisect.bisect_right(self.ranks, macs, key=lambda rank: self.at(rank).cost.macs)
        return self.at(self.ranks[count - 1]) if count else None


@dataclass(frozen=True, slots=True)
class Menu:
    """All that the rules allow at one site; ``reason`` says why there is nothing, when there is nothing."""

    site: Site
    ladders: tuple[Ladder, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """The options proposed for one site; ``reason`` says why there is none, when there is none."""

    site: Site
    proposals: tuple[Proposal, ...]
    reason: str | None = None


def candidates(sites: Sequence[Site]) -> dict[str, Candidate]:
    """What the rules look at, by site name."""
    total = sum(site.cost.macs for site in sites) or 1
    return {s.name: Candidate(s.name, s.kind, s.spec, s.is_stem, s.cost.macs / total) for s in sites}


def require_structures(rules: Sequence[Rule], structures: Mapping[str, Structure]) -> None:
    """Raise RuleFileError for a rule that names an unknown structure."""
    for rule in rules:
        for name in rule.structures:
            if name not in structures:
                known = ", ".join(sorted(structures))
                raise RuleFileError(f"rule {rule.name}: structure {name!r} is not known; known are {known}")


def menus(sites: Sequence[Site], rules: Sequence[Rule], structures: Mapping[str, Structure]) -> tuple[Menu, ...]:
    """What every site could become. Raises RuleFileError for a rule that names an unknown structure."""
    require_structures(rules, structures)
    seen = candidates(sites)
    return tuple(_menu(site, seen[site.name], rules, structures) for site in sites)


def refusal(site: Site, candidate: Candidate, rule: Rule, structures: Mapping[str, Structure]) -> str | None:
    """Why ``rule`` has nothing for a site, whatever the ratio; None when it has something."""
    if site.refusal is not None:
        return site.refusal
    refused = rule.refuse(candidate)
    if refused is not None:
        return refused.text
    reasons = [structures[name].reject(site.spec.per_group) for name in rule.structures]
    return None if None in reasons else "; ".join(dict.fromkeys(r for r in reasons if r))


def _menu(site: Site, candidate: Candidate, rules: Sequence[Rule], structures: Mapping[str, Structure]) -> Menu:
    reasons = [refusal(site, candidate, rule, structures) for rule in rules]
    accepting = [rule for rule, reason in zip(rules, reasons, strict=True) if reason is None]
    ladders = tuple(ladder for rule in accepting for ladder in _ladders(site, rule, structures))
    text = "; ".join(dict.fromkeys(r for r in reasons if r)) or "the rule's parameters leave no variant"
    return Menu(site, ladders, None if ladders else text)


def _ladders(site: Site, rule: Rule, structures: Mapping[str, Structure]) -> list[Ladder]:
    found: list[Ladder] = []
    for structure in (structures[name] for name in rule.structures):
        if structure.reject(site.spec.per_group) is not None:
            continue
        allowed = rule.parameters.get(structure.name, {})
        for variant in allowed_variants(structure, site.folded_spec, allowed):
            ranks = allowed_ranks(structure, site.folded_spec, variant, allowed)
            found.append(Ladder(site, rule, structure, variant, ranks))
    return found


def offer_at(menu: Menu, ratio: float | None) -> Offer:
    """Of every ladder the largest rank within ``ratio`` of the site's own MACs; None: within each rule's own ratio."""
    if menu.reason is not None:
        return Offer(menu.site, (), menu.reason)
    proposals: dict[Option, Proposal] = {}
    for ladder in menu.ladders:
        found = ladder.largest_within(_limit(ladder.rule, ratio) * menu.site.cost.macs)
        if found is not None:
            proposals[found.option] = found
    if proposals:
        return Offer(menu.site, tuple(proposals.values()))
    limit = max(_limit(ladder.rule, ratio) for ladder in menu.ladders)
    names = ", ".join(dict.fromkeys(ladder.structure.name for ladder in menu.ladders))
    return Offer(menu.site, (), f"no option of {names} costs at most {limit:.3g} of its MACs")


def _limit(rule: Rule, ratio: float | None) -> float:
    return min(rule.ratio if ratio is None else ratio, 1 - rule.require.min_mac_saving)


def cost_of(site: Site, option: Option, structure: Structure) -> Cost:
    """What an option costs at a site."""
    stages = structure.stages(site.spec.per_group, option.parameters)
    return option_cost(site.folded_spec, stages, site.input_sizes, option.lowering)
