"""A sweep as one HTML page without outside references."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from markupsafe import Markup

from convrewrite.escaping import printable
from convrewrite.reporting.charts import ACCENT, INK, MARK, SOFT, draw_legend, drawing, svg_of
from convrewrite.reporting.html import rendered
from convrewrite.reporting.sweep_report import HEADERS, SweepPoint, SweepReport, SweptModel, cost_of, sweep_rows

Resource = Literal["macs", "params", "latency"]

COSTS: dict[Resource, str] = {"macs": "MACs", "params": "parameters", "latency": "latency"}

LOOKS = ((ACCENT, "-", "o"), (MARK, "--", "s"), (SOFT, ":", "^"), (INK, "-.", "D"))
"""Colour, dash and mark of the lines, one per model."""


@dataclass(frozen=True, slots=True)
class _Measure:
    """What is drawn over a cost: ``part`` where it is shown in per cent."""

    title: str
    value: Callable[[SweepPoint], float | None]
    label: str
    part: bool


SCORES = (
    _Measure("Agreement", lambda point: point.agreement, "top classes that agree", True),
    _Measure("KL", lambda point: point.kl, "KL from the original (nats)", False),
)

ERROR = _Measure("Error", lambda point: point.error, "relative error of outputs", True)


def sweep_page(sweep: SweepReport) -> str:
    """The page; all that it shows is in it as JSON too, in the element ``sweep``. No script runs in it."""
    rows = [row for model in sweep.models for row in sweep_rows(model)]
    shown = [i for i in range(len(HEADERS)) if i == 0 or any(row[i] for row in rows)]
    data = sweep.model_dump_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return rendered(
        "sweep.html.j2",
        report=sweep,
        names=", ".join(model.name for model in sweep.models),
        axis=COSTS[sweep.resource],
        headers=[HEADERS[i] for i in shown],
        rows=lambda model: [
            ([row[i] for i in shown], point) for row, point in zip(sweep_rows(model), model.points, strict=True)
        ],
        troubled=lambda model: any(point.reason or point.refused for point in model.points),
        curves=_curves(sweep, sweep.resource),
        others=[curve for resource in COSTS if resource != sweep.resource for curve in _curves(sweep, resource)],
        data=Markup(data),
    )


def _curves(sweep: SweepReport, resource: Resource) -> list[tuple[str, Markup]]:
    """A title and a drawing for every measure that points have, against one cost."""
    found = []
    for measure in _measures(sweep):
        lines = [_line(model, measure, resource) for model in sweep.models]
        if any(lines):
            found.append((f"{measure.title} against {COSTS[resource]}", _chart(sweep, measure, resource, lines)))
    return found


def _measures(sweep: SweepReport) -> list[_Measure]:
    """The measures to draw. Where every point has an agreement, the error of outputs would show the same again, and is left
    out."""
    points = [point for model in sweep.models for point in model.points if point.reason is None]
    usual = SCORES if all(point.agreement is not None for point in points) else (*SCORES, ERROR)
    own = sweep.metric or "metric"
    return [*usual, _Measure(own, lambda point: point.metric, own, False)]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A point with what is drawn of it."""

    cost: float
    value: float
    knee: bool
    beaten: bool


def _line(model: SweptModel, measure: _Measure, resource: Resource) -> list[_Drawn]:
    """The points that have a cost and a value."""
    pairs = [(cost_of(point, resource), measure.value(point), point) for point in model.points]
    return [_Drawn(cost, value, p.knee, p.beaten) for cost, value, p in pairs if cost is not None and value is not None]


def _chart(sweep: SweepReport, measure: _Measure, resource: Resource, lines: Sequence[list[_Drawn]]) -> Markup:
    """One line per model; lines differ by marks and dashes too, not by colour alone."""
    with drawing() as (figure, axes):
        from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

        for (colour, dash, mark), model, line in zip(cycle(LOOKS), sweep.models, lines, strict=False):
            front, beaten = ([p for p in line if p.beaten == behind] for behind in (False, True))
            costs, values = [p.cost for p in front], [p.value for p in front]
            axes.plot(costs, values, dash, marker=mark, color=colour, markersize=5, label=_plain(model.name))
            costs, values = [p.cost for p in beaten], [p.value for p in beaten]
            axes.plot(costs, values, mark, color=colour, markersize=5, fillstyle="none")
            for p in front:
                if p.knee:
                    axes.plot([p.cost], [p.value], "o", markersize=12, fillstyle="none", color=INK, clip_on=False)
                    aside = (9, -16) if front[0].value > front[-1].value else (9, 9)  # where the curve bends away
                    axes.annotate("knee", (p.cost, p.value), xytext=aside, textcoords="offset points")
        axes.margins(y=0.15)
        low, high = axes.get_ylim()
        if measure.part and all(point.value <= 1 for line in lines for point in line):  # no tick says 106 %
            axes.set_ylim(low, min(high, 1 + 0.02 * (1 - low)))
        axes.set_xlabel(f"{COSTS[resource]} left of the original's")
        axes.set_ylabel(_plain(measure.label))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        # A power of ten that all ticks share would be drawn where the legend is.
        each = PercentFormatter(1.0, symbol=" %") if measure.part else FuncFormatter(lambda value, _: f"{value:.4g}")
        axes.yaxis.set_major_formatter(each)
        if len(sweep.models) > 1:
            draw_legend(axes)
        return Markup(svg_of(figure))


def _plain(text: str) -> str:
    """A name that matplotlib takes for no formula, and leaves in its legend."""
    return printable(text).replace("$", r"\$").lstrip("_")[:60] or "model"
