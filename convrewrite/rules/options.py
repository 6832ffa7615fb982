"""What the rules allow a site to become: its search space, rank by rank, and what every candidate costs."""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from convrewrite.conv import ConvSpec, Cost
from convrewrite.errors import RuleFileError, UsageError
from convrewrite.graph import Site
from convrewrite.rules.parameters import require_parameters
from convrewrite.rules.schema import Rule, Subject
from convrewrite.structures import Option, Setting, Structure, make_option, option_cost
from convrewrite.values import shown


@dataclass(frozen=True, slots=True)
class Candidate:
    """An option at a site, with its cost and the rule that allows it."""

    option: Option
    cost: Cost
    rule: Rule

    @property
    def most_error(self) -> float:
        """The largest relative output error that the rule allows."""
        return self.rule.require.max_output_error or math.inf

    def stands_for(self, other: "Candidate") -> bool:
        """Whether the other is the same option, by a rule that asks at least as much of its error and its time."""
        own, others = (c.rule.require.min_latency_gain for c in (self, other))
        asks_no_more = own is None or (others is not None and own <= others)
        return self.option == other.option and self.most_error >= other.most_error and asks_no_more


@dataclass(frozen=True, slots=True)
class RankRange:
    """One variant of one structure at one site, rank by rank from cheap to costly. Costs are counted when asked for."""

    site: Site
    rule: Rule
    structure: Structure
    variant: Setting
    ranks: Sequence[int]
    _known: dict[int, Candidate] = field(default_factory=dict, repr=False)

    def at(self, rank: int) -> Candidate:
        """The candidate of this rank."""
        if rank not in self._known:
            option = make_option(self.structure, self.site.folded_spec, {**self.variant, "rank": rank})
            self._known[rank] = Candidate(option, cost_of(self.site, option, self.structure), self.rule)
        return self._known[rank]

    def largest_within(self, macs: float) -> Candidate | None:
        """The candidate of the largest rank that costs at most so many MACs; None when even the first costs more."""
        count = bisect.bisect_right(self.ranks, macs, key=lambda rank: self.at(rank).cost.macs)
        return self.at(self.ranks[count - 1]) if count else None

    def equals(self, other: "RankRange") -> bool:
        """Whether it has the same options as the other, by a rule that requires the same of them; ratios left aside."""
        return (
            (self.structure.name, dict(self.variant)) == (other.structure.name, dict(other.variant))
            and list(self.ranks) == list(other.ranks)
            and self.rule.require == other.rule.require
        )


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All that the rules allow at one site; ``reason`` says why there is nothing, when there is nothing."""

    site: Site
    rank_ranges: tuple[RankRange, ...]
    reason: str | None = None

    @property
    def distinct(self) -> list[RankRange]:
        """The rank ranges, each once: of what several rules allow alike, that of the first rule."""
        found: list[RankRange] = []
        for rank_range in self.rank_ranges:
            if not any(rank_range.equals(known) for known in found):
                found.append(rank_range)
        return found


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The candidates of one site that are fitted, of which one is put in place; ``reason`` says why there is none, when there is
    none."""

    site: Site
    candidates: tuple[Candidate, ...]
    reason: str | None = None


def subjects(sites: Sequence[Site], left: float | None = None) -> dict[str, Subject]:
    """What the rules look at, by site name. ``left`` is as in :class:`Subject`."""
    total = sum(site.cost.macs for site in sites) or 1
    return {s.name: Subject(s.name, s.kind, s.spec, s.is_stem, s.cost.macs / total, left) for s in sites}


def require_structures(rules: Sequence[Rule], structures: Mapping[str, Structure]) -> None:
    """Raise RuleFileError for a rule that names an unknown structure, or restricts a parameter that its structures lack."""
    for rule in rules:
        for name in rule.structures:
            if name not in structures:
                known = ", ".join(sorted(structures))
                raise RuleFileError(f"rule {rule.name}: structure {name!r} is not known; known are {known}")
        require_parameters(rule, structures)


def search_spaces(
    sites: Sequence[Site], rules: Sequence[Rule], structures: Mapping[str, Structure], left: float | None = None
) -> tuple[SearchSpace, ...]:
    """What every site could become. ``left`` is as in :class:`Subject`. Raises RuleFileError for a rule that names an unknown
    structure."""
    require_structures(rules, structures)
    seen = subjects(sites, left)
    return tuple(_search_space(site, seen[site.name], rules, structures) for site in sites)


def refusal(site: Site, subject: Subject, rule: Rule, structures: Mapping[str, Structure]) -> str | None:
    """Why ``rule`` has nothing for a site, whatever the ratio; None when it has something."""
    if site.refusal is not None:
        return site.refusal
    refused = rule.refuse(subject)
    if refused is not None:
        return refused.text
    reasons = [structures[name].reject(site.spec.per_group) for name in rule.structures]
    return None if None in reasons else "; ".join(dict.fromkeys(r for r in reasons if r))


def _search_space(
    site: Site, subject: Subject, rules: Sequence[Rule], structures: Mapping[str, Structure]
) -> SearchSpace:
    reasons = [refusal(site, subject, rule, structures) for rule in rules]
    accepting = [rule for rule, reason in zip(rules, reasons, strict=True) if reason is None]
    rank_ranges = tuple(rank_range for rule in accepting for rank_range in _rank_ranges(site, rule, structures))
    text = "; ".join(dict.fromkeys(r for r in reasons if r)) or "the rule's parameters leave no variant, or no rank"
    return SearchSpace(site, rank_ranges, None if rank_ranges else text)


def _rank_ranges(site: Site, rule: Rule, structures: Mapping[str, Structure]) -> list[RankRange]:
    found: list[RankRange] = []
    for structure in (structures[name] for name in rule.structures):
        if structure.reject(site.spec.per_group) is not None:
            continue
        allowed = rule.parameters.get(structure.name, {})
        for variant in allowed_variants(structure, site.folded_spec, allowed):
            _require_plain(structure, site.folded_spec, variant)
            ranks = allowed_ranks(structure, site.folded_spec, variant, allowed)
            found += [RankRange(site, rule, structure, variant, ranks)] if ranks else []
    return found


def _require_plain(structure: Structure, spec: ConvSpec, variant: Setting) -> None:
    """Raise UsageError for parameters that no plan can hold, and for ranks that are no numbers: the structure may be a caller's
    own."""
    top = structure.full_rank(spec.per_group, variant)
    wrong = {f"parameter {key}": value for key, value in variant.items() if not isinstance(value, int | str)}
    wrong |= {} if isinstance(top, Integral) else {"full_rank": top}
    for where, value in wrong.items():
        expected = "a whole number" if where == "full_rank" else "a whole number of Python, or text"
        raise UsageError(
            f"structure {structure.name}: {where}: expected {expected}, found {shown(value)}, of the type "
            f"{type(value).__name__}; mend the structure"
        )


def shortlist_of(space: SearchSpace) -> Shortlist:
    """The largest rank of every rank range within its rule's ratio of the site's own MACs. An option that several rules allow is
    the one of the rule that asks least of it; if each asks more than another of something, it is there for each of them."""
    if space.reason is not None:
        return Shortlist(space.site, (), space.reason)
    candidates: list[Candidate] = []
    for rank_range in space.rank_ranges:
        found = rank_range.largest_within(_limit(rank_range.rule) * space.site.cost.macs)
        if found is None or any(known.stands_for(found) for known in candidates):
            continue
        candidates = [known for known in candidates if not found.stands_for(known)] + [found]
    if candidates:
        return Shortlist(space.site, tuple(candidates))
    limit = max(_limit(rank_range.rule) for rank_range in space.rank_ranges)
    names = ", ".join(dict.fromkeys(rank_range.structure.name for rank_range in space.rank_ranges))
    return Shortlist(space.site, (), f"no option of {names} costs at most {limit:.3g} of its MACs")


def _limit(rule: Rule) -> float:
    return min(rule.ratio, 1 - rule.require.min_mac_saving)


def cost_of(site: Site, option: Option, structure: Structure) -> Cost:
    """What an option costs at a site."""
    stages = structure.stages(site.spec.per_group, option.parameters)
    return option_cost(site.folded_spec, stages, site.input_sizes, option.lowering)


Allowed = Mapping[str, Sequence[int | float | str]]
"""Values to which a rule restricts a structure's parameters."""


def allowed_variants(structure: Structure, spec: ConvSpec, allowed: Allowed) -> list[Setting]:
    """The structure's variants at this geometry whose every parameter has an allowed value."""
    variants = [v for v in structure.variants(spec.per_group) if spec.kernels == 1 or _mixes(structure, spec, v)]
    return [v for v in variants if all(v[name] in values for name, values in allowed.items() if name in v)]


def _mixes(structure: Structure, spec: ConvSpec, variant: Setting) -> bool:
    """Whether the last stage is a dense one, so that each of several kernels can have a last stage of its own."""
    return structure.stages(spec.per_group, {**variant, "rank": 1})[-1].groups == 1


def allowed_ranks(structure: Structure, spec: ConvSpec, variant: Setting, allowed: Allowed) -> Sequence[int]:
    """The ranks of a variant, ascending; all from one to full rank unless restricted."""
    top = structure.full_rank(spec.per_group, variant)
    if "rank" not in allowed:
        return range(1, top + 1)
    return sorted({int(rank) for rank in allowed["rank"] if 1 <= int(rank) <= top})
