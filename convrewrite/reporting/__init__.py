"""Say what was done and what it is worth: the report as a value, and as text, Markdown and HTML."""

from convrewrite.reporting.build import build_report, recovered_report
from convrewrite.reporting.compared import Compared
from convrewrite.reporting.figures import duration
from convrewrite.reporting.frontier import sweep_page
from convrewrite.reporting.html import render_analysis, render_html, render_rows, render_summary
from convrewrite.reporting.markdown import render_markdown
from convrewrite.reporting.plan_text import render_plan
from convrewrite.reporting.report import AnalysisRow, RecoveredSummary, Report
from convrewrite.reporting.sweep_report import SweepPoint, SweepReport, SweptModel
from convrewrite.reporting.text import render_sites, render_text
from convrewrite.reporting.verifications import render_verification

__all__ = [
    "AnalysisRow",
    "Compared",
    "RecoveredSummary",
    "Report",
    "SweepPoint",
    "SweepReport",
    "SweptModel",
    "build_report",
    "duration",
    "recovered_report",
    "render_analysis",
    "render_html",
    "render_markdown",
    "render_plan",
    "render_rows",
    "render_sites",
    "render_summary",
    "render_text",
    "render_verification",
    "sweep_page",
]
