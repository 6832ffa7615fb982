"""What a plan tells of the choice it made: every option that was measured, and what the plan as a whole promises."""

from collections.abc import Mapping, Sequence

from convrewrite.allocation import Allocation
from convrewrite.lifting import needed_lifts
from convrewrite.meanings import NOTHING, Meaning
from convrewrite.planning import (
    Ask,
    Considered,
    Fingerprint,
    Plan,
    PlannedOption,
    PlannedOutput,
    PlannedSite,
    Predicted,
)
from convrewrite.preparing import Prepared, Settings
from convrewrite.proposing import Proposal
from convrewrite.scoring import Dropped, Scored, Surveyed
from convrewrite.sites import Site


def make_plan(
    prepared: Prepared,
    ask: Ask,
    settings: Settings,
    tool_version: str,
    chosen: Sequence[tuple[Site, Proposal | None, str | None]],
    allocation: Allocation | None,
    meanings: Mapping[str, Meaning] = NOTHING,
) -> Plan:
    """The plan of a choice: site, proposal, and the reason where there is none. ``allocation``: how it was come by;
    ``meanings`` of the outputs, by which it was."""
    surveyed = {entry.site.name: entry for entry in allocation.surveyed} if allocation else {}
    return Plan(
        tool_version=tool_version,
        model=Fingerprint.of(prepared.original),
        rules=tuple(rule.name for rule in prepared.rules),
        budget=dict(ask.budget),
        keep=None if ask.keep is None else {ask.keep.measure: ask.keep.limit},
        seed=settings.seed,
        predicted=None if allocation is None else _predicted(allocation),
        lifted=needed_lifts(prepared.lifted.lifts, {site.name for site, proposal, _ in chosen if proposal}),
        outputs={name: PlannedOutput.of(meaning) for name, meaning in meanings.items()},
        sites=tuple(_planned(site, proposal, reason, surveyed) for site, proposal, reason in chosen),
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


def _planned(
    site: Site, proposal: Proposal | None, reason: str | None, surveyed: Mapping[str, Surveyed]
) -> PlannedSite:
    entry = surveyed.get(site.name)
    return PlannedSite(
        name=site.name,
        kind=site.kind,
        geometry=site.spec.describe(),
        option=PlannedOption.of(proposal.option) if proposal else None,
        reason=reason if proposal is None else None,
        batch_norm=site.batch_norm if proposal else None,
        macs=site.cost.macs,
        parameters=site.cost.parameters,
        seconds=entry.seconds if entry else None,
        considered=_considered(entry, proposal),
    )


def _considered(entry: Surveyed | None, proposal: Proposal | None) -> tuple[Considered, ...]:
    """The measured options and the chosen one, from cheap to dear, then those that were dropped."""
    if entry is None:
        return () if proposal is None else (_unmeasured(proposal),)
    told = [(s, _is_chosen(s, proposal)) for s in entry.options]
    told = sorted((pair for pair in told if pair[0].measured or pair[1]), key=lambda p: p[0].proposal.cost.macs)
    options = (_option(scored, proposal if chosen and proposal else scored.proposal) for scored, chosen in told)
    return (*options, *map(_dropped, entry.dropped))


def _is_chosen(scored: Scored, proposal: Proposal | None) -> bool:
    """Whether it is the same option, which may have got another lowering since."""
    if proposal is None:
        return False
    option, chosen = scored.proposal.option, proposal.option
    return (option.structure, option.setting) == (chosen.structure, chosen.setting)


def _unmeasured(proposal: Proposal) -> Considered:
    return Considered(
        option=PlannedOption.of(proposal.option), macs=proposal.cost.macs, parameters=proposal.cost.parameters
    )


def _option(scored: Scored, proposal: Proposal) -> Considered:
    return Considered(
        option=PlannedOption.of(proposal.option),
        macs=proposal.cost.macs,
        parameters=proposal.cost.parameters,
        seconds=scored.seconds,
        error=scored.error**0.5,
        effect=scored.effect,
    )


def _dropped(entry: Dropped) -> Considered:
    return Considered(
        option=PlannedOption.of(entry.proposal.option),
        macs=entry.proposal.cost.macs,
        parameters=entry.proposal.cost.parameters,
        seconds=entry.seconds,
        error=None if entry.error is None else entry.error**0.5,
        reason=entry.reason,
    )


def _predicted(allocation: Allocation) -> Predicted:
    timed = allocation.totals.seconds is not None
    return Predicted(
        effect=allocation.effect,
        macs=allocation.part("macs"),
        params=allocation.part("params"),
        latency=allocation.part("latency") if timed else None,
    )
