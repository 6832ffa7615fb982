"""A sweep as one HTML page without outside references. Not imported with the package, as the report's page is not."""

import itertools

import matplotlib
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter

from convrewrite.escaping import printable
from convrewrite.reporting.charts import ACCENT, MARK, STYLE, blank_axes, svg_of
from convrewrite.reporting.figures import percent
from convrewrite.reporting.html import rendered
from convrewrite.reporting.sweep_report import HEADERS, SweepReport, cost_of, sweep_rows

AXES = {"macs": "MACs", "params": "parameters", "latency": "latency"}


def sweep_page(sweep: SweepReport) -> str:
    """The page; all that it shows stands in it as JSON too, in the element ``sweep``."""
    data = sweep.model_dump_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return rendered(
        "sweep.html.j2",
        report=sweep,
        names=", ".join(model.name for model in sweep.models),
        axis=AXES[sweep.resource],
        headers=HEADERS,
        rows=lambda model: list(zip(sweep_rows(model), model.points, strict=True)),
        curve=Markup(_curve(sweep)),
        data=Markup(data),
    )


def _curve(sweep: SweepReport) -> str:
    with matplotlib.rc_context(STYLE):
        figure, axes = blank_axes()
        for model, mark in zip(sweep.models, itertools.cycle("os^Dv")):
            known = [(cost_of(p, sweep.resource), p.loss, p.knee) for p in model.points]
            points = [(cost, loss, knee) for cost, loss, knee in known if cost is not None and loss is not None]
            costs, losses = [cost for cost, _, _ in points], [loss for _, loss, _ in points]
            axes.plot(costs, losses, marker=mark, color=ACCENT, label=_plain(model.name))
            for cost, loss, _ in (point for point in points if point[2]):
                axes.plot([cost], [loss], "o", markersize=13, fillstyle="none", color=MARK)
                axes.annotate("knee", (cost, loss), xytext=(0, 12), textcoords="offset points", ha="center", color=MARK)
        shows_scores = any(p.agreement is not None for model in sweep.models for p in model.points)
        axes.set_xlabel(f"{AXES[sweep.resource]} left of the original's")
        axes.set_ylabel("top classes that differ" if shows_scores else "relative error of outputs")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        if len(sweep.models) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
        return svg_of(figure)


def _plain(text: str) -> str:
    """A name that matplotlib takes for no formula."""
    return printable(text).replace("$", r"\$")
