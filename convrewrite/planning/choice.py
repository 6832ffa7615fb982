"""Chooses an option for every site: by each rule's own ratio, within a budget, or by the fidelity that is to be kept."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from convrewrite.errors import PlanError
from convrewrite.graph import Site
from convrewrite.planning.allocation import (
    Allocation,
    FittedPlan,
    allocate,
    fastest_of_equals,
    most_gained,
    require_reachable,
    too_slow,
)
from convrewrite.planning.costs import Counted, Timed
from convrewrite.planning.curves import Surveyed
from convrewrite.planning.effort import FAST, THOROUGH
from convrewrite.planning.fidelity_budget import search, shortfall
from convrewrite.planning.kept_surveys import survey_facts, survey_of_facts
from convrewrite.planning.latency_budget import allocate_measured, measured_part
from convrewrite.planning.latency_table import MIN_GAIN, LatencyTable, fast_enough, in_fastest_lowering
from convrewrite.planning.plan import Plan
from convrewrite.planning.planned import make_plan
from convrewrite.planning.sensitivities import survey
from convrewrite.planning.swaps import evaluate, swap
from convrewrite.rewriting import Outcome, Prepared, Rewritten, Work, rewrite
from convrewrite.rules import Candidate, Shortlist, refusal, shortlist_of, subjects
from convrewrite.runtime import Baseline, Unmeasured
from convrewrite.settings import Constraints, Settings
from convrewrite.version import tool_version

LOG = logging.getLogger(__name__)

ROOM = 0.05
"""Margin, as a part of the original's time, that is added to the fastest plan there is where a budget is suggested: the very
fastest plan does the most harm."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be fitted, the allocation it came from, and the fitted plan where choosing already required fitting it."""

    shortlists: tuple[Shortlist, ...]
    allocation: Allocation | None = None
    fitted: FittedPlan | None = None


@dataclass(frozen=True, slots=True)
class Planner:
    """Chooses for one run, and fits what it chose, as the choice may depend on what the fit shows.

    ``surveyed``: the survey, where one serves several budgets; ``swaps``: whether swaps may improve a fitted plan.
    """

    constraints: Constraints
    work: Work
    baseline: Baseline | Unmeasured
    surveyed: tuple[Surveyed, ...] | None = None
    swaps: bool = True

    def choose(self) -> Choice:
        """By the rules' ratios, within the budget, or by the fidelity that is to be kept.

        Raises PlanError for a budget that cannot be met, before any long work where counts alone show it.
        """
        work = self.work
        asked = {**self.constraints.budget, **({"keep": self.constraints.keep} if self.constraints.keep else {})}
        LOG.info(
            "asked for: %s", ", ".join(f"{name} {part}" for name, part in asked.items()) or "each rule's own ratio"
        )
        if self.constraints.by_ratio:
            with work.watch.timed("latency"):
                return Choice(self._by_ratio())
        rules = [rule.name for rule in work.prepared.rules]
        require_reachable(work.prepared.search_spaces, self.constraints.budget, work.prepared.budgeted, rules)
        surveyed = self.survey() if self.surveyed is None else self._allowed(self.surveyed)
        if not self.constraints.budget:
            return self._choose_by_fidelity(surveyed)
        if "latency" in self.constraints.budget:
            with work.watch.timed("latency"):
                return self._choose_by_latency(surveyed)
        allocation = self._allocated(surveyed)
        return Choice(self._lowered(allocation), allocation)

    def fit(self, choice: Choice) -> tuple[Rewritten, Allocation | None]:
        """The fitted choice and the final allocation. A choice that came from an allocation is checked as a whole, and improved
        by swaps where it does more harm than its parts promised, or where int8 is asked for."""
        if choice.fitted is not None:
            return choice.fitted.rewritten, choice.allocation
        rewritten = rewrite(self.work, choice.shortlists)
        if choice.allocation is None or not self.swaps or self.work.settings.fast or not self.work.data.fit:
            return rewritten, choice.allocation
        checked = evaluate(self.work, choice.allocation, rewritten)
        as_good_as_promised = checked.loss <= choice.allocation.effect
        if as_good_as_promised and not self.work.settings.int8:  # that promise leaves rounding out
            return rewritten, choice.allocation
        LOG.info("the whole does harm of %.3g, its parts promised %.3g: swaps", checked.loss, choice.allocation.effect)
        best = swap(self.work, checked, self.constraints.budget, self._measures_within, self._carried_out)
        return best.rewritten, best.allocation

    def plan(self, choice: Choice) -> Plan:
        """The plan of a choice that was not fitted; where a rule allows several candidates, with the cheapest of them."""
        chosen = [
            (o.site, min(o.candidates, key=lambda p: p.cost.macs) if o.candidates else None, o.reason)
            for o in choice.shortlists
        ]
        return self.plan_of(chosen, choice.allocation)

    def plan_of(
        self, chosen: Sequence[tuple[Site, Candidate | None, str | None]], allocation: Allocation | None
    ) -> Plan:
        """The plan that records what every site became, and the allocation that this came from."""
        work = self.work
        return make_plan(
            work.prepared, self.constraints, work.settings, tool_version(), chosen, allocation, work.evaluation.meanings
        )

    def predicted_saving(self, outcomes: Sequence[Outcome]) -> float:
        """The part of the original's time that the rewritten sites save, from the times of their options alone."""
        latency_table = latency_table_of(self.work.prepared, self.work.settings)
        changed = [(o.site, o.candidate) for o in outcomes if o.candidate is not None]
        saved = sum(latency_table.saving(site, candidate) for site, candidate in changed)
        return saved / self.baseline.seconds(latency_table.timer) if changed else 0.0

    def _by_ratio(self) -> tuple[Shortlist, ...]:
        """Every rule at its own ratio; options that miss a rule's ``min_latency_gain`` are left out where time is measured."""
        prepared, settings = self.work.prepared, self.work.settings
        shortlists = tuple(shortlist_of(space) for space in prepared.search_spaces)
        return fast_enough(shortlists, latency_table_of(prepared, settings)) if settings.measure else shortlists

    def survey(self) -> tuple[Surveyed, ...]:
        """All options of all sites with their effects, and their seconds where speed counts."""
        work, prepared, settings = self.work, self.work.prepared, self.work.settings
        timed = "latency" in self.constraints.budget or (self.constraints.for_speed and settings.measure)
        table = latency_table_of(prepared, settings) if timed else None
        data = work.data
        if not data.fit and not data.held_out:  # from the weights alone: effects are measured on noise
            data = replace(data, held_out=work.evaluation.batches)
        return survey(
            replace(work, data=data),
            effort=FAST if settings.fast else THOROUGH,
            latency_table=table,
        )

    def survey_facts(self) -> list[dict[str, Any] | None]:
        """The survey as plain values, one entry per site, with which a planner of the same run goes on in another process."""
        assert self.surveyed is not None
        return survey_facts(self.work.prepared.search_spaces, self.surveyed)

    def surveyed_by(self, facts: Sequence[object]) -> "Planner":
        """This planner with such a survey. Raises ValueError and LookupError for what its search spaces cannot have."""
        prepared = self.work.prepared
        table = latency_table_of(prepared, self.work.settings)
        return replace(self, surveyed=survey_of_facts(prepared.search_spaces, facts, table))

    def _allowed(self, surveyed: Sequence[Surveyed]) -> tuple[Surveyed, ...]:
        """A survey that serves several budgets, without what the rules do not allow within this one."""
        prepared, found = self.work.prepared, list[Surveyed]()
        seen = subjects(prepared.sites, self.constraints.left)
        for entry in surveyed:
            site, rules = entry.site, {scored.candidate.rule.name: scored.candidate.rule for scored in entry.options}
            why = {name: refusal(site, seen[site.name], rule, prepared.structures) for name, rule in rules.items()}
            options = tuple(scored for scored in entry.options if why[scored.candidate.rule.name] is None)
            if entry.options and not options:
                entry = Surveyed(site, (), reason="; ".join(dict.fromkeys(filter(None, why.values()))))
            found.append(replace(entry, options=options))
        return tuple(found)

    def _allocated(self, surveyed: tuple[Surveyed, ...]) -> Allocation:
        """The allocation within a budget of counts; among plans of about equal effect the fastest, where time was measured.

        Raises PlanError for a budget that cannot be met; its message says where options that were left out as slow would help.
        """
        budget, totals = self.constraints.budget, Counted(self.work.prepared.budgeted)
        try:
            allocation = allocate(surveyed, budget, totals)
        except PlanError as error:
            slow = sum(1 for entry in surveyed for dropped in entry.dropped if too_slow(dropped, entry))
            if not slow or self.constraints.any_speed:
                raise
            left_out = f"{slow} options were left out because they measure slower than what they replace"
            if slow == 1:
                left_out = "1 option was left out because it measures slower than what it replaces"
            raise PlanError("; ".join([str(error), left_out, *self._ways_out(surveyed)])) from error
        found = fastest_of_equals(allocation, budget)
        left = ", ".join(f"{name} {found.part(name):.3f}" for name in budget)
        LOG.info("chosen: %s, predicted effect %.3g, of the best plan %.3g", left, found.effect, allocation.effect)
        return found

    def _ways_out(self, surveyed: Sequence[Surveyed]) -> list[str]:
        """What may be asked for instead where options were left out as slow."""
        gained = min(1.0, most_gained(surveyed) / self.baseline.seconds())  # times of options do not add up exactly
        fast = 1 - gained + ROOM
        ways = ["--any-speed takes them too"] if self.work.settings.timings is None else []  # one excludes the other
        return [*ways, f"--budget latency={min(0.99, fast):.2f} would make it faster"] if fast < 1 else ways

    def _choose_by_latency(self, surveyed: tuple[Surveyed, ...]) -> Choice:
        work = self.work
        work.progress("latency", 0, 1, "the plan as a whole, before it is fitted")
        totals = Timed(work.prepared.budgeted, self.baseline.seconds())
        allocation = allocate_measured(work.prepared, surveyed, self.constraints.budget, totals, self.baseline)
        work.progress("latency", 1, 1, f"predicted {max(0.0, allocation.part('latency')):.2f} of the original's")
        LOG.info("chosen: predicted latency %.3f, effect %.3g", allocation.part("latency"), allocation.effect)
        return Choice(allocation.shortlists(), allocation)

    def _choose_by_fidelity(self, surveyed: tuple[Surveyed, ...]) -> Choice:
        keep, work = self.constraints.keep, self.work
        assert keep is not None
        found = search(
            surveyed,
            Counted(work.prepared.budgeted),
            keep,
            self._carried_out,
            lambda rewritten: shortfall(work.prepared.model, rewritten, work.data, keep, work.evaluation.meanings),
        )
        return Choice(self._lowered(found.allocation), found.allocation, found)

    def _lowered(self, allocation: Allocation) -> tuple[Shortlist, ...]:
        """The chosen options in their fastest lowering, which they already have where the survey measured time."""
        shortlists, settings = allocation.shortlists(), self.work.settings
        timed = any(entry.seconds is not None for entry in allocation.surveyed)
        if timed or not settings.measure:
            return shortlists
        with self.work.watch.timed("latency"):
            return in_fastest_lowering(shortlists, latency_table_of(self.work.prepared, settings))

    def _carried_out(self, allocation: Allocation) -> Rewritten:
        return rewrite(self.work, self._lowered(allocation))

    def _measures_within(self, allocation: Allocation) -> bool:
        """Whether the whole plan measures within the budget of latency, if there is one: the times of options do not add up."""
        if "latency" not in self.constraints.budget or self.work.settings.timings is not None:
            return True
        with self.work.watch.timed("latency"):
            measured = measured_part(self.work.prepared, allocation.shortlists(), self.baseline)
        return measured <= self.constraints.budget["latency"]


def latency_table_of(prepared: Prepared, settings: Settings) -> LatencyTable:
    """The seconds of candidates in this run."""
    least = MIN_GAIN if settings.constraints.for_gain else 0.0 if settings.constraints.for_speed else None
    timer = settings.clock.steady()
    return LatencyTable(prepared.structures, settings.threads, settings.rounds, timer, settings.block, least)
