"""The latency of a plan as a whole, measured before anything is fitted: time does not depend on the weights.

The times of single options add up to that of the model only to within some percent. So the whole plan is built with the weights
it starts with, exported and timed against the original, and the budget is corrected by the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from convrewrite.errors import PlanError
from convrewrite.modules import copy_model
from convrewrite.planning.allocation import Allocation, allocate, unreachable
from convrewrite.planning.costs import Counted
from convrewrite.planning.curves import Surveyed
from convrewrite.planning.plan import OVERSTEP
from convrewrite.rewriting import Prepared, empty_option, replace_site
from convrewrite.rules import Shortlist
from convrewrite.runtime import Baseline, Unmeasured

MEASUREMENTS = 4
"""At most this many plans are timed as a whole."""

CLOSE = 0.97
"""A plan that measures between this part of the budget and the whole budget is taken."""


def allocate_measured(
    prepared: Prepared,
    surveyed: Sequence[Surveyed],
    budget: Mapping[str, float],
    totals: Counted,
    baseline: Baseline | Unmeasured,
) -> Allocation:
    """Of a few allocations that are tried, the one of least effect whose latency *measures* within the budget.

    Where none does, the one that comes nearest. Raises PlanError when even the options' own times cannot meet the budget, and
    when the nearest measures more than ``OVERSTEP`` times the budget.
    """
    if (
        isinstance(baseline, Baseline) and baseline.elsewhere
    ):  # a plan that cannot be timed here is taken as its options predict
        return allocate(surveyed, budget, totals)
    limit = aim = budget["latency"]
    tried: list[tuple[float, Allocation]] = []
    for _ in range(MEASUREMENTS):
        try:
            allocation = allocate(surveyed, {**budget, "latency": aim}, totals)
        except PlanError:
            if not tried:
                raise
            break
        if any(allocation.chosen == known.chosen for _, known in tried):
            break
        measured = measured_part(prepared, allocation.shortlists(), baseline)
        tried.append((measured, allocation))
        if CLOSE * limit <= measured <= limit:
            break
        aim = min(_next_aim([(found, a.part("latency")) for found, a in tried], limit), 0.999)
    within = [allocation for measured, allocation in tried if measured <= limit]
    least, nearest = min(tried, key=lambda pair: pair[0])
    if least > OVERSTEP * limit:
        raise PlanError(unreachable({"latency": limit}, {"latency": least}, [rule.name for rule in prepared.rules]))
    return replace(min(within, key=lambda a: a.effect) if within else nearest, totals=totals)


def _next_aim(tried: Sequence[tuple[float, float]], limit: float) -> float:
    """The predicted latency with which a plan should measure a little less than ``limit``; ``tried`` are pairs of measured and
    predicted latencies. Interpolated between the nearest on both sides, otherwise in proportion to the last one."""
    wanted = limit * (1 + CLOSE) / 2
    below = max((pair for pair in tried if pair[0] <= limit), default=None)
    above = min((pair for pair in tried if pair[0] > limit), default=None)
    if below is not None and above is not None and below[1] < above[1]:
        share = (wanted - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])
    measured, predicted = tried[-1]
    if predicted <= 0:  # options save more than the whole time: what is left has no proportion
        return predicted - (measured - wanted)
    return predicted * wanted / measured


def measured_part(prepared: Prepared, shortlists: Sequence[Shortlist], baseline: Baseline | Unmeasured) -> float:
    """The time of the model with these options, unfitted, as a part of the original's: the median of paired ratios."""
    return baseline.ratio(_unfitted(prepared, shortlists))


def _unfitted(prepared: Prepared, shortlists: Sequence[Shortlist]) -> nn.Module:
    prepared = prepared.at_home
    model = copy_model(prepared.model)
    for shortlist in shortlists:
        for candidate in shortlist.candidates[:1]:
            option, spec = candidate.option, shortlist.site.folded_spec
            stages = prepared.structures[option.structure].stages(spec.per_group, option.parameters)
            like = prepared.model.get_submodule(shortlist.site.name).weight
            replace_site(model, shortlist.site, empty_option(spec, stages, option, like))  # type: ignore[arg-type]
    return model
