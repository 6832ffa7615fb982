"""Between choices and plans: a choice becomes a plan that records it, and a plan becomes the shortlists that are to be fitted.

A plan may come from a file, so each of its sites is compared with the model's before anything is fitted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from convrewrite.errors import PlanError
from convrewrite.graph import Site, needed_lifts
from convrewrite.meanings import NOTHING, Meaning
from convrewrite.planning.allocation import Allocation
from convrewrite.planning.costs import Timed, seconds_of
from convrewrite.planning.curves import Dropped, Scored, Surveyed
from convrewrite.planning.plan import (
    Considered,
    Fingerprint,
    Plan,
    PlannedOption,
    PlannedOutput,
    PlannedSite,
    Predicted,
    planned_structure,
)
from convrewrite.rewriting import Prepared
from convrewrite.rules import Candidate, Rule, Shortlist, cost_of
from convrewrite.settings import Constraints, Settings


def make_plan(
    prepared: Prepared,
    constraints: Constraints,
    settings: Settings,
    tool_version: str,
    chosen: Sequence[tuple[Site, Candidate | None, str | None]],
    allocation: Allocation | None,
    meanings: Mapping[str, Meaning] = NOTHING,
) -> Plan:
    """The plan of a choice: sites with their candidates, or with the reason where there is none. ``allocation``: what the choice
    came from; ``meanings`` of the outputs, by which effects were measured."""
    surveyed = {entry.site.name: entry for entry in allocation.surveyed} if allocation else {}
    return Plan(
        tool_version=tool_version,
        model=Fingerprint.of(prepared.original),
        rules=tuple(rule.name for rule in prepared.rules),
        budget=dict(constraints.budget),
        keep=None if constraints.keep is None else {constraints.keep.measure: constraints.keep.limit},
        any_speed=constraints.any_speed,
        seed=settings.seed,
        predicted=None if allocation is None else _predicted(allocation),
        lifted=needed_lifts(prepared.lifted.lifts, {site.name for site, candidate, _ in chosen if candidate}),
        outputs={name: PlannedOutput.of(meaning) for name, meaning in meanings.items()},
        sites=tuple(_planned(site, candidate, reason, surveyed) for site, candidate, reason in chosen),
    )


def _planned(
    site: Site, candidate: Candidate | None, reason: str | None, surveyed: Mapping[str, Surveyed]
) -> PlannedSite:
    entry = surveyed.get(site.name)
    return PlannedSite(
        name=site.name,
        kind=site.kind,
        geometry=site.spec.describe(),
        option=PlannedOption.of(candidate.option) if candidate else None,
        reason=reason if candidate is None else None,
        batch_norm=site.batch_norm if candidate else None,
        macs=site.cost.macs,
        parameters=site.cost.parameters,
        seconds=entry.seconds if entry else None,
        considered=_considered(entry, candidate),
    )


def _considered(entry: Surveyed | None, candidate: Candidate | None) -> tuple[Considered, ...]:
    """The measured options and the chosen one, from cheap to expensive, then those that were dropped."""
    if entry is None:
        return () if candidate is None else (_at_cost(candidate),)
    told = [(s, _is_chosen(s, candidate)) for s in entry.options]
    told = sorted((pair for pair in told if pair[0].measured or pair[1]), key=lambda p: p[0].candidate.cost.macs)
    options = (_option(scored, candidate if chosen and candidate else scored.candidate) for scored, chosen in told)
    return (*options, *map(_dropped, entry.dropped))


def _is_chosen(scored: Scored, candidate: Candidate | None) -> bool:
    """Whether it is the same option, though its lowering may have changed since."""
    if candidate is None:
        return False
    option, chosen = scored.candidate.option, candidate.option
    return (option.structure, option.setting) == (chosen.structure, chosen.setting)


def _option(scored: Scored, candidate: Candidate) -> Considered:
    return _at_cost(candidate, seconds=seconds_of(scored.costs), error=scored.error, effect=scored.effect)


def _dropped(entry: Dropped) -> Considered:
    return _at_cost(entry.candidate, seconds=entry.seconds, error=entry.error, reason=entry.reason)


def _at_cost(candidate: Candidate, **measured: Any) -> Considered:
    cost = candidate.cost
    return Considered(option=PlannedOption.of(candidate.option), macs=cost.macs, parameters=cost.parameters, **measured)


def _predicted(allocation: Allocation) -> Predicted:
    """What an allocation promises. Times of options do not add up exactly: where they save more than the whole time, they promise
    no latency."""
    latency = allocation.part("latency") if isinstance(allocation.totals, Timed) else None
    return Predicted(
        effect=allocation.effect,
        macs=allocation.part("macs"),
        params=allocation.part("params"),
        latency=None if latency is None or latency < 0 else latency,
    )


def with_kept(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """The plan with some sites kept that it would rewrite, for the given reasons."""
    sites = tuple(
        site.model_copy(update={"option": None, "batch_norm": None, "reason": reasons[site.name]})
        if site.option is not None and site.name in reasons
        else site
        for site in plan.sites
    )
    lifts = needed_lifts(plan.lifted, {site.name for site in sites if site.option})
    return plan.model_copy(update={"sites": sites, "lifted": lifts})


def with_outputs(plan: Plan, meanings: Mapping[str, Meaning]) -> Plan:
    """The plan with what its outputs were taken for when it was carried out."""
    return plan.model_copy(update={"outputs": {name: PlannedOutput.of(meaning) for name, meaning in meanings.items()}})


def shortlists_of(plan: Plan, prepared: Prepared) -> tuple[Shortlist, ...]:
    """One shortlist per site of the model, as planned. Raises PlanError for a plan of other sites or structures."""
    planned = {site.name: site for site in plan.sites}
    strangers = sorted(set(planned) ^ {site.name for site in prepared.sites})
    if strangers:
        raise PlanError(f"the plan and the model differ in their sites: {', '.join(strangers[:3])}; make a new plan")
    rewritten = {name for name, site in planned.items() if site.option is not None}
    if needed_lifts(prepared.lifted.lifts, rewritten) != plan.lifted:
        raise PlanError("the plan and the model differ in their functional convolutions; make a new plan")
    return tuple(_shortlist(site, planned[site.name], prepared) for site in prepared.sites)


def _shortlist(site: Site, planned: PlannedSite, prepared: Prepared) -> Shortlist:
    _require_same(site, planned)
    if planned.option is None:
        return Shortlist(site, (), planned.reason or "the plan keeps it")
    if site.refusal is not None:
        raise PlanError(f"{site.name}: the plan rewrites it, but {site.refusal}; make a new plan")
    structure = planned_structure(site.name, planned.option, site.folded_spec, prepared.structures)
    option = planned.option.option()
    rule = Rule(name="plan", structures=(structure.name,))
    return Shortlist(site, (Candidate(option, cost_of(site, option, structure), rule),))


def _require_same(site: Site, planned: PlannedSite) -> None:
    """Raise PlanError unless a site is as the plan describes it."""
    facts = [("kind", site.kind, planned.kind), ("geometry", site.spec.describe(), planned.geometry)]
    if planned.option is not None:
        facts.append(("BatchNorm", site.batch_norm or "none", planned.batch_norm or "none"))
    for what, found, expected in facts:
        if found != expected:
            raise PlanError(f"{site.name}: the plan says {what} {expected}, the model has {found}; make a new plan")
