"""The frontier of a model: many budgets at the price of a few, as its survey, its inputs and its measurements serve them all."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Unpack

from torch import nn

from convrewrite.errors import PlanError, UsageError
from convrewrite.folders import made_aside, require_room_beside, resolved, told
from convrewrite.inputs import ExampleInput
from convrewrite.modules import surroundings_preserved
from convrewrite.pipeline.keywords import Extras, OptimizeKeywords, RuleSource, asked, signed
from convrewrite.pipeline.networks import Given, ModelSource, network_of
from convrewrite.pipeline.run import Run
from convrewrite.planning import Plan
from convrewrite.process import at_work
from convrewrite.reporting import Report, SweepPoint, SweepReport, SweptModel, sweep_page
from convrewrite.results import Result, save_plan
from convrewrite.rules import Rule, resolve
from convrewrite.settings import Constraints, Settings
from convrewrite.version import tool_version

Metric = Callable[[nn.Module], float]
"""A user's own measure of a model, the more the better or the less; it is only shown."""

BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Parts of the original's cost, unless others are asked for."""

SWEEP, PAGE, PLANS = "sweep.json", "page.html", "plans"
"""What a sweep's folder holds, and nothing else."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points of one or more models, and their plans by the names under which the points know them."""

    report: SweepReport
    plans: Mapping[str, Plan]

    def save(self, folder: str | Path, words: Sequence[str] = ()) -> Path:
        """Write sweep.json, page.html and every plan, aside and in one step; an earlier sweep there is replaced.

        ``words``: what a command needs beside the model and a plan, as ``--calib images``, to make a point again. Raises
        UsageError where the folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        Sweep.check(folder)
        report = _with_commands(self.report, folder, words)
        with made_aside(folder, "another folder with -o") as made:
            (made / PLANS).mkdir(parents=True)
            for name, plan in self.plans.items():
                save_plan(plan, made / PLANS / name)
            (made / SWEEP).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (made / PAGE).write_text(sweep_page(report), encoding="utf-8")
        return folder

    @staticmethod
    def check(folder: Path) -> None:
        """Raise UsageError unless a sweep can be put there: only an earlier one is replaced, or an empty folder."""
        with told(folder, "another folder with -o"):
            place = resolved(folder)
            if place.exists():
                strangers = _strangers(place)
                if strangers:
                    raise UsageError(
                        f"{folder}: expected a new folder or an earlier sweep, found {strangers[0]}; name another with -o"
                    )
            require_room_beside(place)

    def joined(self, other: "Sweep") -> "Sweep":
        """Both side by side: the models of the same sweep over several."""
        models = (*self.report.models, *other.report.models)
        return Sweep(self.report.model_copy(update={"models": models}), {**self.plans, **other.plans})

    def __str__(self) -> str:
        return self.report.text()

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return self.report._repr_html_()


@signed
def sweep(
    model: ModelSource,
    example_input: ExampleInput | None = None,
    rules: Sequence[RuleSource] = ("balanced",),
    calibration: object = None,
    budgets: Sequence[float] = BUDGETS,
    resource: Literal["macs", "params", "latency"] = "macs",
    metric: Metric | None = None,
    *,
    settings: Settings | None = None,
    **keywords: Unpack[OptimizeKeywords],
) -> Sweep:
    """What every one of several budgets leaves of a model's fidelity: each plan is fitted, and measured as a result is.

    Inputs, survey and the original's own measurements are shared; points are not refined, unless ``refine=True``, and not
    bettered by swaps: ``optimize`` within the same budget is at least as good. A budget that cannot be met is a point with the
    reason. ``metric`` is called with the original and each rewritten model. The other arguments are those of :func:`optimize`.
    """
    given, extras = asked(settings, {}, keywords, OptimizeKeywords)
    checked = _checked(budgets)
    chosen = resolve(rules)
    settings = replace(given, budget={resource: checked[0]}, keep=None, refine=bool(given.refine))
    network = network_of(model, example_input, settings.timeout)
    with at_work(settings.seed), surroundings_preserved(network.model):
        return _Sweeping(network, chosen, settings, extras, resource, metric).sweep(calibration, checked)


def _checked(budgets: Sequence[float]) -> list[float]:
    """From the largest to the smallest, each once. Raises UsageError."""
    wanted = sorted({float(budget) for budget in budgets}, reverse=True)
    if not wanted or not all(0 < budget < 1 for budget in wanted):
        raise UsageError(f"budgets: expected parts in (0, 1), as 0.8..0.1, found {', '.join(f'{b:g}' for b in wanted)}")
    return wanted


@dataclass(frozen=True, slots=True)
class _Sweeping:
    """One model, and what is asked of all its points."""

    network: Given
    rules: Sequence[Rule]
    settings: Settings
    extras: Extras
    resource: Literal["macs", "params", "latency"]
    metric: Metric | None

    def sweep(self, calibration: object, budgets: Sequence[float]) -> Sweep:
        network, extras = self.network, self.extras
        name = extras.name or network.name
        run = Run.to_plan(
            network.model, network.inputs, self.rules, calibration, self.settings, extras.structures, extras.told
        )
        with run.scratch:
            shared = replace(run.surveyed().planner, swaps=False)
            points, plans, last = [], {}, None
            for index, budget in enumerate(budgets):
                extras.told("points", index, len(budgets), f"{self.resource}={budget:g}")
                constraints = Constraints({self.resource: budget}, None, run.planner.constraints.outputs)
                at_budget = replace(run, planner=replace(shared, constraints=constraints))
                try:
                    result = at_budget.finish(at_budget.choose(), name, network.notes)
                except PlanError as error:
                    points.append(SweepPoint(budget=budget, reason=str(error)))
                    continue
                last, plan = result.report, f"{_file_name(name)}-{self.resource}-{budget:g}.json"
                plans[plan] = result.plan
                points.append(self._point(budget, plan, result))
            extras.told("points", len(budgets), len(budgets), "done")
        return Sweep(self._report(run, name, points, last), plans)

    def _point(self, budget: float, plan: str, result: Result) -> SweepPoint:
        report, totals = result.report, result.report.totals
        agreements = [row.top1_agreement for row in report.fidelity if row.top1_agreement is not None]
        kls = [row.kl for row in report.fidelity if row.kl is not None]
        latency = totals.onnx_latency_seconds
        return SweepPoint(
            budget=budget,
            plan=plan,
            macs=totals.macs.ratio,
            parameters=totals.parameters.ratio,
            latency=None if latency is None else latency.ratio,
            agreement=min(agreements, default=None),
            kl=None if not kls else max(0.0, *kls),
            error=max((row.relative_error for row in report.fidelity), default=None),
            metric=None if self.metric is None else float(self.metric(result.model)),
            refused=report.refused,
        )

    def _report(self, run: Run, name: str, points: Sequence[SweepPoint], last: Report | None) -> SweepReport:
        totals = run.work.prepared.totals
        latency = None if last is None else last.totals.onnx_latency_seconds
        swept = SweptModel(
            name=name,
            macs=totals.macs,
            parameters=totals.parameters,
            seconds=None if latency is None else latency.before,
            metric=None if self.metric is None else float(self.metric(self.network.model)),
            points=tuple(points),
        )
        return SweepReport(
            tool_version=tool_version(),
            resource=self.resource,
            rules=tuple(rule.name for rule in self.rules),
            basis=(last and last.fidelity_basis) or "not measured",
            metric=None if self.metric is None else getattr(self.metric, "__name__", "metric"),
            models=(swept.marked(self.resource),),
        )


def _with_commands(report: SweepReport, folder: Path, words: Sequence[str]) -> SweepReport:
    """With the command that makes each point again."""

    def told_of(model: SweptModel, point: SweepPoint) -> SweepPoint:
        if point.plan is None:
            return point
        made = f"{_file_name(model.name)}-{point.budget:g}"
        place = str(folder / PLANS / point.plan)
        parts = ["convrewrite", "apply", model.name, place, "-o", made, *words, "--no-refine"]
        return point.model_copy(update={"command": shlex.join(parts)})

    models = tuple(
        model.model_copy(update={"points": tuple(told_of(model, point) for point in model.points)})
        for model in report.models
    )
    return report.model_copy(update={"models": models})


def _strangers(place: Path) -> list[str]:
    if not place.is_dir():
        return ["a file"]
    return sorted(path.name for path in place.iterdir() if path.name not in (SWEEP, PAGE, PLANS))


def _file_name(name: str) -> str:
    """A name without what a path cannot have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem)[:60].strip("-") or "model"
