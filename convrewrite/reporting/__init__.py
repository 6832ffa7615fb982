"""Reports: the value (:mod:`model`), and its forms for a terminal and as a Markdown page; JSON comes from the value."""

from convrewrite.reporting.markdown import render_markdown
from convrewrite.reporting.model import (
    AnalysisRow,
    Asked,
    CalibrationSummary,
    Change,
    Environment,
    LatencyChange,
    OutputFidelityRow,
    OutputRow,
    ParityRow,
    Reached,
    Report,
    SiteRow,
    Totals,
)
from convrewrite.reporting.text import render_sites, render_text

__all__ = [
    "AnalysisRow",
    "Asked",
    "CalibrationSummary",
    "Change",
    "Environment",
    "LatencyChange",
    "OutputFidelityRow",
    "OutputRow",
    "ParityRow",
    "Reached",
    "Report",
    "SiteRow",
    "Totals",
    "render_markdown",
    "render_sites",
    "render_text",
]
