"""The evaluation as a whole of a fitted plan, and swaps that lower its effect.

The effects of single sites do not simply add up: behind a rewritten prefix and before a rewritten rest an option may do
more or less harm than alone. So the sites of a fitted plan are gone through once more, with the options next to the
chosen one fitted in its place, and the knapsack is solved again with what these change *in the whole rewritten model*.
The new plan is taken when its own measured effect is lower.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from convrewrite.errors import FitError, PlanError
from convrewrite.meanings import effect_of
from convrewrite.modules import named_outputs, run
from convrewrite.planning.allocation import Allocation, FittedPlan, allocate
from convrewrite.planning.curves import Scored, Surveyed
from convrewrite.planning.sensitivities import THOROUGH, Evaluator
from convrewrite.rewriting import Propagation, Rewritten, SiteFit, Work

STEP = 0.2
"""Part of what an option costs of a resource by which its neighbours cost less or more."""


def evaluate(work: Work, allocation: Allocation, rewritten: Rewritten) -> FittedPlan:
    """The effect of the whole plan, on the inputs that effects are measured on."""
    pairs = (
        (named_outputs(run(work.prepared.model, batch)), named_outputs(run(rewritten.model, batch)))
        for batch in work.evaluation.batches
    )
    return FittedPlan(allocation, rewritten, effect_of(pairs, work.evaluation.meanings))


def swap(
    work: Work,
    fitted: FittedPlan,
    budget: Mapping[str, float],
    holds: Callable[[Allocation], bool],
    attempt: Callable[[Allocation], Rewritten],
) -> FittedPlan:
    """The plan with the swaps that lower its effect, or as it was. ``holds`` says whether a plan is within the budget where
    only the whole shows it, as its latency does: one that is not is never fitted by ``attempt``."""
    nearby = _survey_nearby(work, fitted, tuple(budget))
    try:
        better = allocate(nearby, budget, fitted.allocation.totals)
    except PlanError:  # the plan itself oversteps the budget a little, as one that was corrected by measurement may
        return fitted
    chosen = _told_alone(better, fitted.allocation)
    if chosen == fitted.allocation.chosen:
        return fitted
    moved = Allocation(fitted.allocation.surveyed, chosen, better.totals)
    if not holds(moved):
        return fitted
    found = evaluate(work, moved, attempt(moved))
    return found if found.loss < fitted.loss else fitted


def _told_alone(better: Allocation, known: Allocation) -> tuple[Scored | None, ...]:
    """The chosen options with the effects they have alone, as the survey knows them."""
    return tuple(
        None if scored is None else next(s for s in entry.options if s.candidate.option == scored.candidate.option)
        for entry, scored in zip(known.surveyed, better.chosen, strict=True)
    )


def _survey_nearby(work: Work, fitted: FittedPlan, resources: Sequence[str]) -> tuple[Surveyed, ...]:
    """Every site with its option and the neighbours; effects are differences in the rewritten model, above the least."""
    prepared, settings, data = work.prepared, work.settings, work.data
    allocation = fitted.allocation
    rewritten = [entry.site for entry, scored in zip(allocation.surveyed, allocation.chosen, strict=True) if scored]
    batches = (*data.fit, *data.held_out)
    walk = Propagation(prepared.model, prepared.traced, rewritten, batches, settings.memory, fitted.rewritten.model)
    evaluator = Evaluator.of(prepared.model, walk, data, meanings=work.evaluation.meanings)
    found: list[Surveyed] = []
    try:
        for entry, scored in zip(allocation.surveyed, allocation.chosen, strict=True):
            if scored is None:
                found.append(replace(entry, options=()))
                continue
            work.progress("swaps", len([f for f in found if f.options]), len(rewritten), entry.site.name)
            found.append(_nearby(work, walk, evaluator, entry, scored, resources))
            walk.replace(entry.site, walk.rewritten.get_submodule(entry.site.name))
            work.progress("swaps", len([f for f in found if f.options]), len(rewritten), entry.site.name)
    finally:
        walk.close()
    return tuple(found)


def _nearby(
    work: Work, walk: Propagation, evaluator: Evaluator, entry: Surveyed, chosen: Scored, resources: Sequence[str]
) -> Surveyed:
    """The chosen option and its neighbours, all fitted alike, so that their effects can be compared."""
    try:
        site_fit = SiteFit.of(walk, entry.site, work.data, work.weights, work.settings.seed, work.watch)
    except FitError:  # nothing else can be tried there; the rewriting that follows says whether the option can be
        return replace(entry, options=(chosen,), must_change=True)
    options = [chosen, *(_neighbours(entry, chosen, resources) if site_fit.reached else ())]
    effects = []
    for scored in options:
        option = scored.candidate.option
        structure = work.prepared.structures[option.structure]
        with work.watch.timed("solves"), site_fit.solving_threads():
            fitted = site_fit.fit(structure, option, iterations=site_fit.effort(THOROUGH.iterations))
        with work.watch.timed("effects"), torch.no_grad():
            effects.append(evaluator.effect(entry.site, site_fit.build(structure, option, fitted)))
    # Only sites that are rewritten take part, each by its difference: the knapsack does not mind a common constant, but
    # to keep the site as it was must stay out of it.
    told = [replace(scored, effect=effect) for scored, effect in zip(options, effects, strict=True)]
    return replace(entry, options=tuple(told), must_change=True)


def _neighbours(entry: Surveyed, chosen: Scored, resources: Sequence[str]) -> list[Scored]:
    """Of every resource the least harmful options that cost about a step less and a step more."""
    found: dict[object, Scored] = {}
    for resource in resources:
        here = chosen.costs.of(resource)
        for low, high in ((1 - 2 * STEP, 1 - STEP / 2), (1 + STEP / 2, 1 + 2 * STEP)):
            near = [s for s in entry.options if low * here <= s.costs.of(resource) <= high * here]
            if near:
                best = min(near, key=lambda s: s.effect * s.costs.of(resource))
                found[best.candidate.option] = best
    return list(found.values())
