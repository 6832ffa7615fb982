"""The points of one model's frontier: what they share is made once, and each point is made from that, here or in another process.

Processes exchange text: the beginning of a frontier, and the results of points.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict

from convrewrite.errors import PlanError
from convrewrite.modules import surroundings_preserved
from convrewrite.pipeline.keywords import Extras
from convrewrite.pipeline.metrics import Metric, measured_by
from convrewrite.pipeline.networks import BoundNetwork
from convrewrite.pipeline.run import Run
from convrewrite.planning import Plan, Planner
from convrewrite.process import at_work
from convrewrite.reporting import SweepPoint
from convrewrite.results import Result
from convrewrite.rules import Rule
from convrewrite.settings import Settings
from convrewrite.worst import Worst

Resource = Literal["macs", "params", "latency"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Beginning(_Part):
    """What all points of a model share: its MACs and parameters, the metric of the original, and the survey as plain values."""

    macs: int
    parameters: int
    metric: float | None
    survey: tuple[dict[str, Any] | None, ...]


class Made(_Part):
    """A point with its plan as JSON, and what its result was compared with: ``basis`` names the inputs, ``seconds`` are the
    original's."""

    point: SweepPoint
    plan: str | None = None
    basis: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Frontier:
    """One model, and what is asked of all its points."""

    network: BoundNetwork
    rules: Sequence[Rule]
    calibration: object
    settings: Settings
    extras: Extras
    budgets: Sequence[float]
    metric: Metric | None

    @property
    def resource(self) -> Resource:
        """The resource that the budgets are parts of."""
        (resource,) = self.settings.budget or {}
        return cast(Resource, resource)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.extras.name or self.network.name

    def made(self) -> tuple[Beginning, list[Made]]:
        """The beginning and all points, made in this process."""
        with at_work(self.settings.seed), surroundings_preserved(self.network.model):
            run = self._run()
            with run.scratch:
                surveyed = run.surveyed()
                return self._beginning(surveyed.planner), list(self._points(surveyed, self.budgets))

    def beginning(self) -> Beginning:
        """What the points share, made in this process."""
        with at_work(self.settings.seed), surroundings_preserved(self.network.model):
            run = self._run()
            with run.scratch:
                return self._beginning(run.surveyed().planner)

    def points(self, beginning: Beginning, budgets: Sequence[float]) -> list[Made]:
        """Some points, made from what all share. Raises ValueError and LookupError for a beginning of another frontier."""
        with at_work(self.settings.seed), surroundings_preserved(self.network.model):
            run = self._run()
            with run.scratch:
                planner = run.planner.surveyed_by(beginning.survey)
                return list(self._points(replace(run, planner=planner), budgets))

    def _run(self) -> Run:
        """A run whose results are not timed in eager torch, as points do not show that time."""
        network, extras = self.network, self.extras
        run = Run.to_plan(
            network.model,
            network.inputs,
            self.rules,
            self.calibration,
            self.settings,
            extras.structures,
            extras.listener,
        )
        return run if run.baseline is None else replace(run, baseline=replace(run.baseline, eager=False))

    def _beginning(self, planner: Planner) -> Beginning:
        totals = planner.work.prepared.totals
        return Beginning(
            macs=totals.macs,
            parameters=totals.parameters,
            metric=measured_by(self.metric, self.network.model, "the original"),
            survey=tuple(planner.survey_facts()),
        )

    def _points(self, run: Run, budgets: Sequence[float]) -> Iterator[Made]:
        progress = self.extras.listener
        for index, budget in enumerate(budgets):
            progress("points", index, len(budgets), f"{self.resource}={budget:g}")
            constraints = replace(run.planner.constraints, budget={self.resource: budget})
            planner = replace(run.planner, constraints=constraints, swaps=False)
            yield self._point(replace(run, planner=planner), budget)
        progress("points", len(budgets), len(budgets), "done")

    def _point(self, run: Run, budget: float) -> Made:
        try:
            result = run.finish(run.choose(), self.name, self.network.notes)
        except PlanError as error:
            return Made(point=SweepPoint(budget=budget, reason=str(error)))
        report = result.report
        latency = report.totals.onnx_latency_seconds
        return Made(
            point=self._measured(budget, result),
            plan=result.plan.to_json(),
            basis=report.fidelity_basis,
            seconds=None if latency is None else latency.before,
        )

    def _measured(self, budget: float, result: Result) -> SweepPoint:
        report, totals = result.report, result.report.totals
        worst, latency = Worst.of(report.fidelity), totals.onnx_latency_seconds
        return SweepPoint(
            budget=budget,
            macs=totals.macs.ratio,
            parameters=totals.parameters.ratio,
            latency=None if latency is None else latency.ratio,
            agreement=worst.agreement,
            kl=_loss(worst.kl),
            error=_loss(worst.error),
            metric=measured_by(self.metric, result.model, f"the model of {self.resource}={budget:g}"),
            refused=report.refused,
        )


def _loss(found: float | None) -> float | None:
    """None for one that is infinite or not a number; a divergence below zero is rounding."""
    return max(0.0, found) if found is not None and math.isfinite(found) else None


def plan_of(made: Made) -> Plan | None:
    """The plan of a point, if there is one."""
    return None if made.plan is None else Plan.from_json(made.plan, "the plan of a point")
