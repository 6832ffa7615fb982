"""A sweep as one HTML page without outside references. Not imported with the package, as the report's page is not."""

from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from convrewrite.escaping import printable
from convrewrite.reporting.charts import svg_of
from convrewrite.reporting.sweep_report import HEADERS, SweepReport, cost_of, sweep_rows

AXES = {"macs": "MACs", "params": "parameters", "latency": "latency"}

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sweep: {{ names }}</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
  table { border-collapse: collapse; margin: 0.5rem 0; display: block; overflow-x: auto; }
  th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #8886; text-align: left; white-space: nowrap; }
  figure { margin: 1rem 0; background: #fff; max-width: 60rem; }
  svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>Sweep: {{ names }}</h1>
<p>What is left of the {{ axis }} against how far outputs are from the original's. Rules: {{ report.rules | join(", ") }}.
Fidelity was {{ report.basis }}.</p>
<figure>{{ curve }}</figure>
{%- for model in report.models %}
<h2>{{ model.name }}</h2>
<table>
<thead><tr>{% for header in headers %}<th scope="col">{{ header }}</th>{% endfor %}<th scope="col">command</th></tr></thead>
<tbody>
{%- for row, point in rows(model) %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}<td><code>{{ point.command or point.reason }}</code></td></tr>
{%- endfor %}
</tbody>
</table>
{%- endfor %}
<script type="application/json" id="sweep">{{ data }}</script>
</body>
</html>
"""


def sweep_page(sweep: SweepReport) -> str:
    """The page; all that it shows stands in it as JSON too, in the element ``sweep``."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown)
    data = sweep.model_dump_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return environment.from_string(_TEMPLATE).render(
        report=sweep,
        names=", ".join(model.name for model in sweep.models),
        axis=AXES[sweep.resource],
        headers=HEADERS,
        rows=lambda model: list(zip(sweep_rows(model), model.points, strict=True)),
        curve=Markup(svg_of(_curve(sweep))),
        data=Markup(data),
    )


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _curve(sweep: SweepReport) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for model in sweep.models:
        points = [(cost_of(p, sweep.resource), p.loss, p) for p in model.points]
        known = [(cost, loss, p) for cost, loss, p in points if cost is not None and loss is not None]
        axes.plot([cost for cost, _, _ in known], [loss for _, loss, _ in known], "o-", label=_plain(model.name))
        for cost, loss, _ in ((c, value, p) for c, value, p in known if p.knee):
            axes.annotate("knee", (cost, loss), xytext=(0, 12), textcoords="offset points", ha="center")
            axes.plot([cost], [loss], "o", markersize=12, fillstyle="none", color="black")
    shows_scores = any(p.agreement is not None for model in sweep.models for p in model.points)
    axes.set_xlabel(f"{AXES[sweep.resource]} left of the original's")
    axes.set_ylabel("top classes that differ" if shows_scores else "relative error of outputs")
    axes.grid(alpha=0.3)
    if len(sweep.models) > 1:
        axes.legend()
    return figure


def _plain(text: str) -> str:
    """A name that matplotlib takes for no formula."""
    return printable(text).replace("$", r"\$")
