"""A sweep as one HTML page without outside references."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from convrewrite.escaping import printable
from convrewrite.reporting.charts import ACCENT, INK, MARK, SOFT, drawing, svg_of
from convrewrite.reporting.sweep_report import HEADERS, SweepPoint, SweepReport, SweptModel, cost_of, sweep_rows

TEMPLATES = Path(__file__).parent / "templates"

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


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Sweep: {{ names }}</title>
<style>
{{ style }}
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 0.4rem; }
figure svg { display: block; width: 100%; height: auto; }
td { white-space: nowrap; }
tr.knee td { background: var(--chosen); font-weight: 600; }
.commands { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.35rem 1rem; margin: 0; }
.commands dd { margin: 0; }
.commands span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
</style>
</head>
<body>
<header>
<p class="brand">convrewrite sweep</p>
<h1>{{ names }}</h1>
<p class="lead">How far outputs are from the original's, against what is left of its cost. Budgets are parts of the {{ axis }};
rules: {{ report.rules | join(", ") }}. Fidelity was {{ report.basis }}. A line leads through the points that
no other beats; one that is beaten by another, which costs no more and loses less, is hollow.</p>
</header>
<main>
{%- macro charts(curves) %}
<div class="pair">
{%- for title, curve in curves %}
<section class="card"><figure><figcaption>{{ title }}</figcaption>{{ curve }}</figure></section>
{%- endfor %}
</div>
{%- endmacro %}
{{ charts(curves) }}
{%- for model in report.models %}
<section class="card" aria-labelledby="model-{{ loop.index }}">
<h2 id="model-{{ loop.index }}">{{ model.name }}</h2>
{%- if model.metric is not none %}
<p class="soft">{{ report.metric }} of the original: {{ "%.4g" | format(model.metric) }}.</p>
{%- endif %}
<div class="scroll" role="region" tabindex="0" aria-label="Points of {{ model.name }}">
<table>
<thead><tr>
{%- for header in headers %}<th scope="col">{{ header or "point" }}</th>{% endfor -%}
{%- if troubled(model) %}<th scope="col">what is wrong</th>{% endif %}</tr></thead>
<tbody>
{%- for row, point in rows(model) %}
<tr{% if point.knee %} class="knee"{% endif %}>{% for cell in row %}<td>{{ cell }}</td>{% endfor -%}
{%- if troubled(model) %}<td>{{ point.reason or point.refused or "" }}</td>{% endif %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
{%- if model.points | selectattr("command") | list %}
<h3>What makes a point</h3>
<dl class="commands">
{%- for point in model.points if point.command %}
<dt>{{ "%g" | format(point.budget) }}</dt><dd><code>
{%- for word in point.command.split(" ") %}<span>{{ word }}</span>{{ " " if not loop.last }}{% endfor -%}
</code></dd>
{%- endfor %}
</dl>
{%- endif %}
</section>
{%- endfor %}
{{ charts(others) }}
</main>
<script type="application/json" id="sweep">{{ data }}</script>
</body>
</html>
"""


def sweep_page(sweep: SweepReport) -> str:
    """The page; all that it shows is in it as JSON too, in the element ``sweep``. No script runs in it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown)
    rows = [row for model in sweep.models for row in sweep_rows(model)]
    shown = [i for i in range(len(HEADERS)) if i == 0 or any(row[i] for row in rows)]
    data = sweep.model_dump_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return environment.from_string(_TEMPLATE).render(
        report=sweep,
        names=", ".join(model.name for model in sweep.models),
        axis=COSTS[sweep.resource],
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        headers=[HEADERS[i] for i in shown],
        rows=lambda model: [
            ([row[i] for i in shown], point) for row, point in zip(sweep_rows(model), model.points, strict=True)
        ],
        troubled=lambda model: any(point.reason or point.refused for point in model.points),
        curves=_curves(sweep, sweep.resource),
        others=[curve for resource in COSTS if resource != sweep.resource for curve in _curves(sweep, resource)],
        data=Markup(data),
    )


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


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
        from matplotlib.ticker import FuncFormatter, PercentFormatter

        for (colour, dash, mark), model, line in zip(cycle(LOOKS), sweep.models, lines, strict=False):
            front, beaten = ([p for p in line if p.beaten == behind] for behind in (False, True))
            costs, values = [p.cost for p in front], [p.value for p in front]
            axes.plot(costs, values, dash, marker=mark, color=colour, markersize=5, label=_plain(model.name))
            costs, values = [p.cost for p in beaten], [p.value for p in beaten]
            axes.plot(costs, values, mark, color=colour, markersize=5, fillstyle="none")
            for p in front:
                if p.knee:
                    axes.plot([p.cost], [p.value], "o", markersize=12, fillstyle="none", color=INK)
                    aside = (9, -16) if front[0].value > front[-1].value else (9, 9)  # where the curve bends away
                    axes.annotate("knee", (p.cost, p.value), xytext=aside, textcoords="offset points")
        axes.margins(y=0.15)
        low, high = axes.get_ylim()
        if measure.part and all(point.value <= 1 for line in lines for point in line):  # no tick says 106 %
            axes.set_ylim(low, min(high, 1 + 0.02 * (1 - low)))
        axes.set_xlabel(f"{COSTS[resource]} left of the original's")
        axes.set_ylabel(_plain(measure.label))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        # A power of ten that all ticks share would be drawn where the legend is.
        each = PercentFormatter(1.0, symbol=" %") if measure.part else FuncFormatter(lambda value, _: f"{value:.4g}")
        axes.yaxis.set_major_formatter(each)
        if len(sweep.models) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
        return Markup(svg_of(figure))


def _plain(text: str) -> str:
    """A name that matplotlib takes for no formula, and leaves in its legend."""
    return printable(text).replace("$", r"\$").lstrip("_")[:60] or "model"
