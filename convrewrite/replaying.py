"""A plan that was written down, as offers again for the model it belongs to."""

from convrewrite.errors import PlanError
from convrewrite.lifting import needed_lifts
from convrewrite.planning import Plan, PlannedSite, planned_structure
from convrewrite.preparing import Prepared
from convrewrite.proposing import Offer, Proposal, cost_of
from convrewrite.rules import Rule
from convrewrite.sites import Site


def offers_of(plan: Plan, prepared: Prepared) -> tuple[Offer, ...]:
    """One offer per site of the model, as the plan has it. Raises PlanError for a plan of other sites or structures."""
    planned = {site.name: site for site in plan.sites}
    strangers = sorted(set(planned) ^ {site.name for site in prepared.sites})
    if strangers:
        raise PlanError(f"the plan and the model differ in their sites: {', '.join(strangers[:3])}; make a new plan")
    rewritten = {name for name, site in planned.items() if site.option is not None}
    if needed_lifts(prepared.lifted.lifts, rewritten) != plan.lifted:
        raise PlanError("the plan and the model differ in their functional convolutions; make a new plan")
    return tuple(_offer(site, planned[site.name], prepared) for site in prepared.sites)


def _offer(site: Site, planned: PlannedSite, prepared: Prepared) -> Offer:
    _require_same(site, planned)
    if planned.option is None:
        return Offer(site, (), planned.reason or "the plan keeps it")
    if site.refusal is not None:
        raise PlanError(f"{site.name}: the plan rewrites it, but {site.refusal}; make a new plan")
    structure = planned_structure(site.name, planned.option, site.folded_spec, prepared.structures)
    option = planned.option.option()
    rule = Rule(name="plan", structures=(structure.name,))
    return Offer(site, (Proposal(option, cost_of(site, option, structure), rule),))


def _require_same(site: Site, planned: PlannedSite) -> None:
    """Raise PlanError unless a site is what the plan says of it."""
    facts = [("kind", site.kind, planned.kind), ("geometry", site.spec.describe(), planned.geometry)]
    if planned.option is not None:
        facts.append(("BatchNorm", site.batch_norm or "none", planned.batch_norm or "none"))
    for what, found, expected in facts:
        if found != expected:
            raise PlanError(f"{site.name}: the plan says {what} {expected}, the model has {found}; make a new plan")
