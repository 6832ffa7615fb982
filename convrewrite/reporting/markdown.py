"""The report as a Markdown page that can be read without knowing the run."""

import re
from collections.abc import Sequence

from tabulate import tabulate

from convrewrite.escaping import printable
from convrewrite.reporting import figures
from convrewrite.reporting.report import Report

BEGINS = re.compile(r"^(\d+(?=[.)])|(?=[#>+=-]))")
"""What would begin a heading, a quotation, a list or an underline, if no backslash were put before it."""


def render_markdown(report: Report) -> str:
    """The whole page, ending in a newline."""
    totals = _table(figures.TOTALS_HEADERS, figures.totals_rows(report), "lrrl")
    sections = [
        f"# {_plain(report.model)}: convolutions rewritten",
        *map(_line, figures.failures(report)),
        _section("Warnings", "\n".join(f"- {_line(warning)}" for warning in report.warnings))
        if report.warnings
        else "",
        _line(figures.headline(report)),
        f"Input {figures.shapes(report)}; rules: {_plain(figures.joined(report.rules))}.",
        _section("What was saved", totals, figures.latency_sentence(report)),
        _asked(report),
        _section("Fidelity: rewritten against original", *_fidelity(report)),
        _recovered(report),
        _section(figures.parity_title(report), _parity(report)),
        _exports(report),
        _section("Sites", *_sites(report)),
        _section("Calibration", _plain(figures.calibration_sentence(report))),
        _section("Notes", "\n".join(f"- {_line(note)}" for note in report.notes)) if report.notes else "",
        _section("Environment", *_environment(report)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _asked(report: Report) -> str:
    rows = figures.asked_rows(report)
    return _section("Asked and reached", _table(figures.ASKED_HEADERS, rows, "lll")) if rows else ""


def _fidelity(report: Report) -> tuple[str, ...]:
    if not report.fidelity:
        return (f"Fidelity was {figures.NOT_MEASURED}.",)
    basis = f"Fidelity was {figures.fidelity_basis(report)}."
    headers, rows = figures.fidelity_table(report)
    taken = "\n".join(f"- {_line(sentence)}" for sentence in figures.output_sentences(report))
    return (_plain(basis), _table(headers, rows, "ll" + "r" * (len(headers) - 2)), taken)


def _recovered(report: Report) -> str:
    if report.recovered is None:
        return ""
    rows = [(str(step), f"{effect:.3g}") for step, effect in report.recovered.curve]
    told = "\n".join(f"- {_line(sentence)}" for sentence in figures.recovered_sentences(report))
    return _section("Recovery", told, _table(figures.CURVE_HEADERS, rows, "rr"))


def _parity(report: Report) -> str:
    if not report.parity:
        return f"Parity was {figures.NOT_MEASURED}."
    headers, rows = figures.parity_table(report)
    return _table(headers, rows, "l" + "r" * (len(headers) - 2) + "l")


def _exports(report: Report) -> str:
    if not report.exports:
        return ""
    told = "\n".join(f"- {_line(sentence)}" for sentence in figures.export_sentences(report))
    return _section("Exports", _table(figures.EXPORT_HEADERS, figures.export_rows(report), "llrrrrrl"), told)


def _sites(report: Report) -> tuple[str, ...]:
    if not report.sites:
        return ("No convolutions were found.",)
    rewritten = sum(site.action == "rewritten" for site in report.sites)
    summary = f"{rewritten} of {len(report.sites)} rewritten. MACs are of one example, summed over a site's calls."
    rows = [figures.site_cells(site) for site in report.sites]
    return (summary, _table(figures.SITE_HEADERS, rows, "llllrrrrrrlr"))


def _environment(report: Report) -> tuple[str, ...]:
    seconds = figures.stages_sentence(report)
    return (f"{_plain(figures.environment_sentence(report))}.", f"Wall time: {_plain(seconds)}." if seconds else "")


def _section(title: str, *parts: str) -> str:
    return "\n\n".join(part for part in (f"## {title}", *parts) if part)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    names = ["right" if letter == "r" else "left" for letter in alignment]
    cells = [[_plain(cell) for cell in row] for row in rows]
    table: str = tabulate(cells, headers, tablefmt="pipe", disable_numparse=True, colalign=names)
    return table


def _line(text: str) -> str:
    """As :func:`_plain`, at the beginning of a line, where a sign or a number may make a heading, a quotation or a list of it."""
    return BEGINS.sub(r"\1\\", _plain(text))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line and inside a table cell as well."""
    text = printable(" ".join(part for part in text.replace("\n", " ").split(" ") if part))
    for character in "\\`*_|<[&~":
        text = text.replace(character, f"\\{character}")
    return text
