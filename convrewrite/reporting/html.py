"""The report as one HTML page without outside references: styles, script and drawings are in it, so the file can be mailed.

The page states what it may do (a Content-Security-Policy): nothing is loaded, and only its own script runs, so that a name in a
model could do nothing even if it were not escaped.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from convrewrite.escaping import printable
from convrewrite.planning import Plan
from convrewrite.reporting import charts, figures
from convrewrite.reporting.page import SITE_COLUMNS, view_of
from convrewrite.reporting.report import AnalysisRow, Report
from convrewrite.reporting.survey import ANALYSIS_COLUMNS, survey_of
from convrewrite.version import tool_version

TEMPLATES = Path(__file__).parent / "templates"


def render_html(report: Report, plan: Plan | None = None) -> str:
    """The whole page; every name is escaped. ``plan``: the plan that was followed, for the options that were considered."""
    view = view_of(report, plan)
    return rendered(
        "report.html.j2",
        report=report,
        view=view,
        columns=SITE_COLUMNS,
        depth=Markup(charts.depth_chart(view.points)),
        agreement=Markup(charts.agreement_chart(view.points)),
        curve=Markup(charts.recovery_chart(report.recovered)) if report.recovered else "",
    )


def render_analysis(model: str, rows: Sequence[AnalysisRow], notes: Sequence[str] = ()) -> str:
    """The page of a model that nothing was done to: where its cost lies, and which rules would take what."""
    return rendered(
        "analysis.html.j2",
        model=model,
        survey=survey_of(rows),
        notes=notes,
        columns=ANALYSIS_COLUMNS,
        version=tool_version(),
    )


def render_summary(report: Report) -> str:
    """The report as a piece of a notebook: what is wrong, the headline in three figures, and the sites to unfold."""
    view = view_of(report, None)
    return rendered(
        "summary.html.j2", title=report.model, warnings=(*figures.failures(report), *report.warnings), tiles=view.tiles,
        columns=SITE_COLUMNS, rows=[site.cells for site in view.sites],
    )  # fmt: skip


def render_rows(model: str, rows: Sequence[AnalysisRow]) -> str:
    """The sites of a model as a piece of a notebook."""
    survey = survey_of(rows)
    return rendered(
        "summary.html.j2", title=model, warnings=(), tiles=survey.tiles, columns=ANALYSIS_COLUMNS,
        rows=[site.cells for site in survey.sites],
    )  # fmt: skip


def rendered(template: str, **values: Any) -> str:
    """A template with these values, and with the style and the script of all pages; every text is escaped."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template(template)
    return page.render(figures=figures, style=Markup(style), script=Markup(script), script_hash=allowed, **values)


@cache
def _environment() -> Environment:
    """Kept for the process, as it keeps its templates once they are compiled."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True,
        trim_blocks=True, lstrip_blocks=True, finalize=_finalized,
    )  # fmt: skip


def _finalized(value: Any) -> Any:
    """A value as the page shows it: its text, with control characters written out. What is markup already stays."""
    return value if isinstance(value, Markup) else printable(str(value))
