"""A plan that was written down, as offers again for the model it belongs to."""

from convrewrite.errors import PlanError
from convrewrite.planning import Plan, PlannedSite
from convrewrite.preparing import Prepared
from convrewrite.proposing import Offer, Proposal, cost_of
from convrewrite.rules import Rule
from convrewrite.sites import Site
from convrewrite.structure import lowerings


def offers_of(plan: Plan, prepared: Prepared) -> tuple[Offer, ...]:
    """One offer per site of the model, as the plan has it. Raises PlanError for a plan of other sites or structures."""
    planned = {site.name: site for site in plan.sites}
    strangers = sorted(set(planned) ^ {site.name for site in prepared.sites})
    if strangers:
        raise PlanError(f"the plan and the model differ in their sites: {', '.join(strangers[:3])}; make a new plan")
    return tuple(_offer(site, planned[site.name], prepared) for site in prepared.sites)


def _offer(site: Site, planned: PlannedSite, prepared: Prepared) -> Offer:
    if planned.option is None:
        return Offer(site, (), planned.reason or "the plan keeps it")
    structure = prepared.structures.get(planned.option.structure)
    if structure is None:
        raise PlanError(
            f"{site.name}: structure {planned.option.structure!r} is not known; known are {', '.join(prepared.structures)}"
        )
    refused = site.refusal or structure.reject(site.spec.per_group)
    if refused is not None:
        raise PlanError(f"{site.name}: the plan rewrites it, but {refused}; make a new plan")
    option = planned.option.option()
    _require_setting(site, planned, prepared)
    rule = Rule(name="plan", structures=(structure.name,))
    return Offer(site, (Proposal(option, cost_of(site, option, structure), rule),))


def _require_setting(site: Site, planned: PlannedSite, prepared: Prepared) -> None:
    """Raise PlanError for parameters or a lowering that the structure does not have here, or a rank out of its range."""
    assert planned.option is not None
    structure, spec = prepared.structures[planned.option.structure], site.folded_spec.per_group
    rank = planned.option.parameters.get("rank")
    variant = {key: value for key, value in planned.option.parameters.items() if key != "rank"}
    if variant not in [dict(known) for known in structure.variants(spec)]:
        raise PlanError(f"{site.name}: {structure.name} has no variant {variant} here; make a new plan")
    top = structure.full_rank(spec, variant)
    if not isinstance(rank, int) or not 1 <= rank <= top:
        raise PlanError(f"{site.name}: {structure.name}: expected a rank from 1 to {top}, found {rank}")
    known = lowerings(structure.stages(spec, planned.option.parameters))
    if planned.option.lowering not in known:
        raise PlanError(
            f"{site.name}: {structure.name}: expected the lowering {' or '.join(known)}, found {planned.option.lowering!r}"
        )
