"""The report as one HTML page that asks for nothing: styles, script and drawings are in it, so the file can be mailed.

What the page may do is said in it (a Content-Security-Policy): nothing is loaded, and of scripts only its own runs, so that a
name in a model could not act even where it were not escaped. This module is not imported with the package.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from convrewrite.escaping import printable
from convrewrite.planning import Plan
from convrewrite.reporting import charts, figures
from convrewrite.reporting.page import SITE_COLUMNS, view_of
from convrewrite.reporting.report import Report

TEMPLATES = Path(__file__).parent / "templates"


def render_html(report: Report, plan: Plan | None = None) -> str:
    """The whole page; every name is escaped. ``plan``: what the report followed, for the options that were considered."""
    view = view_of(report, plan)
    return _rendered(
        "report.html.j2",
        report=report,
        view=view,
        columns=SITE_COLUMNS,
        depth=Markup(charts.depth_chart(view.points)),
        agreement=Markup(charts.agreement_chart(view.points)),
        curve=Markup(charts.recovery_chart(report.recovered)) if report.recovered else "",
    )


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True,
        trim_blocks=True, lstrip_blocks=True, finalize=_finalized,
    )  # fmt: skip
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        figures=figures, style=Markup(style), script=Markup(script), script_hash=allowed, **values
    )


def _finalized(value: Any) -> Any:
    """What stands in the page for a value: its text without control characters. What is a piece of a page already stays."""
    return value if isinstance(value, Markup) else printable(str(value))
