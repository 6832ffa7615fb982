"""The frontier of a model: many budgets for the time of a few, as they share its survey, its inputs and its measurements."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Unpack, cast

from convrewrite import values
from convrewrite.errors import UsageError
from convrewrite.escaping import as_text
from convrewrite.folders import (
    given_path,
    made_aside,
    read_text,
    require_idle,
    require_replaceable,
    require_room_beside,
    resolved,
    write_errors,
)
from convrewrite.inputs import ExampleInput
from convrewrite.pipeline.clusters import require_cluster, workers_of
from convrewrite.pipeline.handed import Handed, collected
from convrewrite.pipeline.keywords import FrontierKeywords, RuleSource, SweepKeywords, asked, require_known, signed
from convrewrite.pipeline.metrics import Metric, called
from convrewrite.pipeline.networks import ModelSource, network_of
from convrewrite.pipeline.points import Beginning, Frontier, Made, Resource, plan_of
from convrewrite.planning import Plan
from convrewrite.progress import Progress, silent
from convrewrite.reporting import SweepPoint, SweepReport, SweptModel, sweep_page
from convrewrite.rules import resolve
from convrewrite.settings import BUDGETS as BUDGETED
from convrewrite.settings import Settings
from convrewrite.version import tool_version

BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""The budgets, as parts of the original's cost, unless others are asked for."""

SWEEP, PAGE, PLANS = "sweep.json", "page.html", "plans"
"""What a sweep's folder holds, and nothing else."""

NOT_MEASURED = "not measured"
"""The basis of a sweep without a point that has a plan."""

OR = ", or "
"""Between the bases of several models."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points of one or more models, and their plans by the names that the points give."""

    report: SweepReport
    plans: Mapping[str, Plan]

    def save(self, folder: str | Path, words: Sequence[str] | None = None) -> Path:
        """Write sweep.json, page.html and every plan, aside and in one step; an earlier sweep there is replaced.

        ``words``: what a command needs to make a point again besides the model and a plan, such as ``--calib images``; None:
        there is no such command, for example for a model made in Python. Raises UsageError where the folder holds something else,
        or cannot be written.
        """
        folder = given_path(folder, "the folder to write")
        Sweep.check(folder)
        report = self.report if words is None else _with_commands(self.report, folder, words)
        with made_aside(folder, "another folder with -o") as made:
            (made / PLANS).mkdir(parents=True)
            for name, plan in self.plans.items():
                (made / PLANS / name).write_text(plan.to_json(), encoding="utf-8")
            (made / SWEEP).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (made / PAGE).write_text(sweep_page(report), encoding="utf-8")
        return folder

    @staticmethod
    def check(folder: Path) -> None:
        """Raise UsageError unless a sweep can be put there: only an earlier one is replaced, or an empty folder."""
        with write_errors(folder, "another folder with -o"):
            place = resolved(folder)
            if place.exists():
                require_idle(folder, place)
                strangers = _strangers(place)
                if strangers:
                    raise UsageError(
                        f"{folder}: expected a new folder or an earlier sweep, found {strangers[0]}; name another with -o"
                    )
                require_replaceable(folder, place, "another folder with -o")
            require_room_beside(place)

    def joined(self, other: "Sweep") -> "Sweep":
        """Both as one sweep over several models; its rules are those of both, and its basis is that of each where they differ.
        Where two models have the same name, such as files of one name in two folders, the plans of the second get names of their
        own.

        Raises UsageError where the budgets are parts of another resource, or the metric is another one."""
        _require_alike(self.report, other.report)
        plans, models = dict(self.plans), list(self.report.models)
        for model in other.report.models:
            names = _free_names(plans, model, other.plans)
            plans |= {names[name]: other.plans[name] for name in names}
            points = (p if p.plan is None else p.model_copy(update={"plan": names[p.plan]}) for p in model.points)
            models.append(model.model_copy(update={"points": tuple(points)}))
        rules = tuple(dict.fromkeys((*self.report.rules, *other.report.rules)))
        told = {"models": tuple(models), "rules": rules, "basis": _basis_of((self.report, other.report))}
        return Sweep(self.report.model_copy(update=told), plans)

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
    resource: Resource = "macs",
    metric: Metric | None = None,
    *,
    settings: Settings | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Sweep:
    """How much of a model's fidelity each of several budgets leaves: each plan is fitted, and measured as a result is.

    Inputs, survey and the original's own measurements are shared, and fits as far as plans begin alike; points are not refined,
    unless ``refine=True``, and not improved by swaps: ``optimize`` within the same budget is at least as good. A budget that
    cannot be met is a point with the reason. ``metric`` is called with copies of the original and of each rewritten model.
    ``cluster``: hand the work to Dask, to processes here (two for ``"local:2"``) or to the scheduler at an address, whose workers
    are trusted; raises UsageError for a cluster that cannot be used, and ProcessLostError where its workers die. The other
    arguments are those of :func:`optimize`.
    """
    require_known(keywords, SweepKeywords)
    cluster, rest = keywords.get("cluster"), {name: value for name, value in keywords.items() if name != "cluster"}
    asked = frontier_of(
        model,
        example_input,
        rules,
        calibration,
        budgets,
        resource,
        metric,
        settings=settings,
        **cast(FrontierKeywords, rest),
    )
    return sweep_all([asked], cluster, asked.extras.listener)


def frontier_of(
    model: ModelSource,
    example_input: ExampleInput | None,
    rules: Sequence[RuleSource],
    calibration: object,
    budgets: Sequence[float],
    resource: Resource,
    metric: Metric | None,
    *,
    settings: Settings | None = None,
    **keywords: Unpack[FrontierKeywords],
) -> Frontier:
    """The checked arguments of ``sweep`` for one model, which is opened. Raises UsageError, ModelLoadError."""
    given, extras = asked(settings, {}, keywords, FrontierKeywords)
    parts = _checked(budgets)
    if resource not in BUDGETED:
        raise UsageError(f"resource: expected {', '.join(BUDGETED)}, found {values.shown(resource)}")
    if metric is not None and not callable(metric):
        raise UsageError(
            f"metric: expected a function from a model to a number, found {values.shown(metric)}; give one, or None"
        )
    if given.keep is not None:
        raise UsageError(
            "keep: expected budgets alone, as a sweep measures what each keeps, found keep too; leave it out"
        )
    if given.budget:
        raise UsageError(
            "budget: expected budgets and a resource, as a sweep has many, found one budget too; leave it out"
        )
    # The smallest budget, within which most sites take part: all points share one survey.
    points = replace(given, budget={resource: parts[-1]}, keep=None, refine=bool(given.refine))
    given = replace(points, int8=False, export=(), half=False)
    network = network_of(model, example_input, given.timeout)
    return Frontier(network, resolve(rules), calibration, given, extras, parts, metric)


def sweep_all(frontiers: Iterable[Frontier], cluster: str | None = None, progress: Progress = silent) -> Sweep:
    """One sweep over several models, made one after another, or all at once in a cluster; the results are the same."""
    if cluster is None:
        return reduce(Sweep.joined, (_sweep_of(frontier, *frontier.made()) for frontier in frontiers))
    require_cluster(cluster)
    opened = list(frontiers)  # what is wrong with a model shows before anything is started
    with workers_of(cluster) as workers:
        handed = [Handed.to(workers, frontier) for frontier in opened]
        made = collected(workers, handed, progress)
        return reduce(Sweep.joined, (_sweep_of(one.frontier, *found) for one, found in zip(handed, made, strict=True)))


def _checked(budgets: Sequence[float]) -> list[float]:
    """The budgets from the largest to the smallest, each once. Raises UsageError for anything but parts in (0, 1).

    Two that read alike count as one, as 0.1 + 0.2 and 0.3: their plans would have the same name.
    """
    try:
        wanted = sorted({float(budget) for budget in budgets}, reverse=True)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"budgets: expected parts in (0, 1), as [0.5, 0.3], found {values.shown(budgets)}") from None
    if not wanted or not all(0 < budget < 1 for budget in wanted):
        raise UsageError(
            f"budgets: expected parts in (0, 1), as 0.8..0.1, found {', '.join(f'{b:g}' for b in wanted) or 'none'}"
        )
    return list({f"{budget:g}": budget for budget in wanted}.values())


def _sweep_of(frontier: Frontier, beginning: Beginning, made: Sequence[Made]) -> Sweep:
    """The sweep of one model, from its points."""
    points, plans = list[SweepPoint](), dict[str, Plan]()
    for one in made:
        name, plan = f"{_file_name(frontier.name)}-{frontier.resource}-{one.point.budget:g}.json", plan_of(one)
        points.append(one.point if plan is None else one.point.model_copy(update={"plan": name}))
        if plan is not None:
            plans[name] = plan
    reached = [one for one in made if one.plan is not None]
    swept = SweptModel(
        name=frontier.name,
        macs=beginning.macs,
        parameters=beginning.parameters,
        seconds=reached[-1].seconds if reached else None,
        metric=beginning.metric,
        points=tuple(points),
    )
    report = SweepReport(
        tool_version=tool_version(),
        resource=frontier.resource,
        rules=tuple(rule.name for rule in frontier.rules),
        basis=(reached[-1].basis if reached else None) or NOT_MEASURED,
        metric=None if frontier.metric is None else called(frontier.metric),
        models=(swept.marked(frontier.resource),),
    )
    return Sweep(report, plans)


def _require_alike(one: SweepReport, other: SweepReport) -> None:
    """Raise UsageError for sweeps of which one report could not say what the points of both are measured by."""
    for name in ("resource", "metric"):
        own, theirs = getattr(one, name), getattr(other, name)
        if own != theirs:
            raise UsageError(
                f"sweep: expected another one with the {name} {own or 'none'}, found {theirs or 'none'}; keep them apart, or "
                "make both alike"
            )


def _basis_of(reports: Sequence[SweepReport]) -> str:
    """What fidelity was measured on in any of the reports."""
    parts = dict.fromkeys(part for report in reports for part in report.basis.split(OR))
    return OR.join(part for part in parts if part != NOT_MEASURED) or NOT_MEASURED


def _free_names(plans: Mapping[str, Plan], model: SweptModel, theirs: Mapping[str, Plan]) -> dict[str, str]:
    """Names for the plans of a model that no other plan has, not even on a file system that takes ``A`` for ``a``."""
    own = [point.plan for point in model.points if point.plan is not None]
    taken = {name.casefold(): plan for name, plan in plans.items()}
    numbered = ({name: name if number == 1 else f"{number}-{name}" for name in own} for number in count(1))
    return next(
        names
        for names in numbered
        if all(taken.get(new.casefold(), theirs[old]) == theirs[old] for old, new in names.items())
    )


def _with_commands(report: SweepReport, folder: Path, words: Sequence[str]) -> SweepReport:
    """The report with the command that makes each point again."""
    refined = [] if "--refine" in words else ["--no-refine"]

    def told_of(model: SweptModel, point: SweepPoint) -> SweepPoint:
        if point.plan is None:
            return point
        made = f"{point.plan.removesuffix(f'-{point.budget:g}.json').rpartition('-')[0]}-{point.budget:g}"
        place = str(folder / PLANS / point.plan)
        parts = ["convrewrite", "apply", model.name, place, "-o", made, *words, *refined]
        return point.model_copy(update={"command": as_text(shlex.join(parts))})

    models = tuple(
        model.model_copy(update={"points": tuple(told_of(model, point) for point in model.points)})
        for model in report.models
    )
    return report.model_copy(update={"models": models})


def _strangers(place: Path) -> list[str]:
    if not place.is_dir():
        return ["a file"]
    names = sorted(path.name for path in place.iterdir())
    known = _plans_of(place / SWEEP)
    if known is None:  # page, plans, and a file of that name may be the user's own
        return names
    plans = place / PLANS
    own = [f"{PLANS}/{path.name}" for path in sorted(plans.iterdir())] if plans.is_dir() else []
    return [name for name in names if name not in (SWEEP, PAGE, PLANS)] + [name for name in own if name not in known]


def _plans_of(file: Path) -> set[str] | None:
    """The plans that belong to an earlier sweep according to its ``sweep.json``; None where that is missing or holds something
    else."""
    try:
        report = SweepReport.read(read_text(file, UsageError, "a sweep"))
    except (UsageError, ValueError):
        return None
    return {f"{PLANS}/{point.plan}" for model in report.models for point in model.points if point.plan}


def _file_name(name: str) -> str:
    """A name without characters that a path cannot have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem)[:60].strip("-") or "model"
