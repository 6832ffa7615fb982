"""The report as one HTML page without outside references: the chart is inline SVG, so the file can be mailed.

This module is not imported with the package: jinja2 and matplotlib are only needed by who asks for the page.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from convrewrite.escaping import printable
from convrewrite.process import quiet
from convrewrite.reporting import figures
from convrewrite.reporting.report import RecoveredSummary, Report, SiteRow

LARGEST = 24
"""Sites that the chart shows, at most: those with the most MACs."""

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ report.model }}: convolutions rewritten</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
  table { border-collapse: collapse; margin: 0.5rem 0; }
  th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
  td { white-space: nowrap; }
  .sites td { white-space: normal; }
  .sites td:nth-child(n+5):nth-child(-n+10) { white-space: nowrap; }
  .sites td:nth-child(4) { min-width: 12rem; }
  .warnings { border-left: 0.3rem solid #b3261e; padding: 0.5rem 2rem; font-weight: 600; }
  .kept td { color: #767676; }
  svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
{%- macro table(headers, rows) %}
<table>
<tr>{% for header in headers %}<th>{{ header }}</th>{% endfor %}</tr>
{%- for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table>
{%- endmacro %}
<h1>{{ report.model }}: convolutions rewritten</h1>
{%- if report.warnings %}
<ul class="warnings">{% for warning in report.warnings %}<li>{{ warning }}</li>{% endfor %}</ul>
{%- endif %}
<p>{{ figures.headline(report) }}</p>
<p>Input {{ figures.shapes(report) }}; rules: {{ figures.joined(report.rules) }}.</p>
<h2>What was saved</h2>
{{ table(figures.TOTALS_HEADERS, figures.totals_rows(report)) }}
<p>{{ figures.latency_sentence(report) }}</p>
{%- if figures.asked_rows(report) %}
<h2>Asked and reached</h2>
{{ table(figures.ASKED_HEADERS, figures.asked_rows(report)) }}
{%- endif %}
<h2>Fidelity: rewritten against original</h2>
{%- if report.fidelity %}
<p>Fidelity was {{ figures.fidelity_basis(report) }}.</p>
{{ table(*figures.fidelity_table(report)) }}
<ul>{% for sentence in figures.output_sentences(report) %}<li>{{ sentence }}</li>{% endfor %}</ul>
{%- else %}
<p>Fidelity was {{ figures.NOT_MEASURED }}.</p>
{%- endif %}
{%- if report.recovered %}
<h2>Recovery</h2>
<ul>{% for sentence in figures.recovered_sentences(report) %}<li>{{ sentence }}</li>{% endfor %}</ul>
{{ curve }}
{%- endif %}
<h2>Parity: onnxruntime against torch</h2>
{%- if report.parity %}
{{ table(*figures.parity_table(report)) }}
{%- else %}
<p>Parity was {{ figures.NOT_MEASURED }}.</p>
{%- endif %}
<h2>Sites</h2>
{%- if report.sites %}
{{ chart }}
<table class="sites">
<tr>{% for header in site_headers %}<th>{{ header }}</th>{% endfor %}</tr>
{%- for site in report.sites %}
<tr class="{{ site.action }}">{% for cell in figures.site_cells(site) %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table>
{%- else %}
<p>No convolutions were found.</p>
{%- endif %}
<h2>Calibration</h2>
<p>{{ figures.calibration_sentence(report) }}</p>
{%- if report.notes %}
<h2>Notes</h2>
<ul>{% for note in report.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{%- endif %}
<h2>Environment</h2>
<p>{{ figures.environment_sentence(report) }}.</p>
{%- if report.seconds %}
<p>Wall time: {{ figures.stages_sentence(report) }}.</p>
{%- endif %}
</body>
</html>
"""


def render_html(report: Report) -> str:
    """The whole page; every name is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True, finalize=_finalized
    )
    values: dict[str, Any] = {
        "report": report,
        "figures": figures,
        "site_headers": figures.SITE_HEADERS,
        "chart": Markup(_chart(report.sites)) if report.sites else "",
        "curve": Markup(_curve(report.recovered)) if report.recovered else "",
    }
    return environment.from_string(_TEMPLATE).render(values)


def _finalized(value: Any) -> Any:
    """What stands in the page for a value: its text without control characters. What is a piece of a page already stays."""
    return value if isinstance(value, Markup) else printable(str(value))


def _chart(sites: Sequence[SiteRow]) -> str:
    """MACs before and after of the largest sites, in the order of the network, as an ``<svg>`` element."""
    largest = sorted(range(len(sites)), key=lambda index: -sites[index].macs_before)[:LARGEST]
    shown = [sites[index] for index in sorted(largest)]
    places = range(len(shown))
    figure = Figure(figsize=(9, 1.2 + 0.25 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.barh(places, [site.macs_before / 1e6 for site in shown], height=0.8, color="#c9d6e3", label="before")
    axes.barh(places, [site.macs_after / 1e6 for site in shown], height=0.4, color="#2b6ca3", label="after")
    axes.set_yticks(places, labels=[printable(site.name)[-40:] for site in shown])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name may hold a dollar sign
    axes.invert_yaxis()
    axes.set_xlabel("MACs of one example, in millions")
    axes.legend(frameon=False)
    return svg_of(figure)


def _curve(recovered: RecoveredSummary) -> str:
    """The effect on held-out inputs over the steps of a recovery, and that of what came in, as an ``<svg>`` element."""
    points = [(step, effect) for step, effect in recovered.curve if 0 < effect < math.inf]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [step for step, _ in points], [effect for _, effect in points], marker=".", color="#2b6ca3", label="held out"
    )
    if recovered.before > 0:
        axes.axhline(recovered.before, color="#c9d6e3", label="what came in")
    if not recovered.unchanged:
        axes.plot([recovered.kept_step], [recovered.after], "o", color="#b3261e", label="kept")
    if points:
        axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("effect on held-out inputs")
    axes.legend(frameon=False)
    return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """The same report gives the same bytes: no date, and ids from a fixed salt."""
    buffer = io.StringIO()
    with quiet(), matplotlib.rc_context({"svg.hashsalt": "convrewrite", "svg.fonttype": "none"}):  # of missing glyphs
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
