"""The report for a terminal: plain tables, at most 110 columns wide."""

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from convrewrite.reporting import figures
from convrewrite.reporting.figures import WIDTH
from convrewrite.reporting.report import AnalysisRow, Report, SiteRow

FIDELITY_WIDTHS = dict(zip(figures.FIDELITY_HEADERS, (26, 13, 14, 15, 9, 7, 13), strict=True))
_BASIS_MARKS = {"held-out inputs": "", "synthetic inputs": " s", "weights": " w"}
_BASIS_LEGEND = {
    "held-out inputs": "on held-out inputs",
    "synthetic inputs": "s: on synthetic inputs",
    "weights": "w: of the weights alone, without inputs",
}


STAND_INS = 0xF0000
"""Code point from which on letters of other scripts are laid out as: of private use, one column wide. tabulate counts a wide
letter as two columns where wcwidth happens to be installed, and a report is the same text everywhere."""


def render_text(report: Report, *, exports_only: bool = False) -> str:
    """The whole report, or what it says of other forms alone, ending in a newline."""
    if exports_only:
        return f"{_exports(report)}\n"
    intro = [
        figures.headline(report),
        f"Input {figures.shapes(report)}; rules: {figures.joined(report.rules)}.",
        figures.calibration_sentence(report),
    ]
    sections = [
        _titled("Warnings", "\n".join(_filled(f"- {warning}", "  ") for warning in report.warnings)),
        "\n".join(map(_filled, intro)),
        _sites(report.sites),
        _titled("Totals", _table(figures.TOTALS_HEADERS, figures.totals_rows(report), (24, 14, 14, 50), "lrrl")),
        _asked(report),
        _fidelity(report),
        _titled(
            "Recovery", "\n".join(_filled(f"- {sentence}", "  ") for sentence in figures.recovered_sentences(report))
        ),
        _parity(report),
        _exports(report),
        _titled("Notes", "\n".join(_filled(f"- {note}", "  ") for note in report.notes)),
        _titled("Stages", _filled(figures.stages_sentence(report))),
        _filled(figures.environment_sentence(report)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _exports(report: Report) -> str:
    if not report.exports:
        return ""
    headers = tuple(header.replace(" to ", " to\n").replace("-1 ", "-1\n") for header in figures.EXPORT_HEADERS)
    table = _table(headers, figures.export_rows(report), (14, 24, 8, 9, 9, 9, 9, 12), "llrrrrrl")
    told = [_filled(sentence, "  ") for sentence in figures.export_sentences(report)]
    return _titled("Exports: other forms against torch", "\n".join((table, *told)))


def render_sites(rows: Sequence[AnalysisRow]) -> str:
    """The sites of a model with their costs, and which rules would take them; the reasons stand below the table."""
    reasons: dict[str, int] = {}
    cells = [
        (
            row.name,
            row.kind,
            row.geometry + figures.calls(row.calls),
            figures.count(row.parameters),
            figures.count(row.macs),
            figures.percent(row.mac_share),
            _verdicts(row, reasons),
        )
        for row in rows
    ]
    if not cells:
        return "No convolutions were found.\n"
    headers = ("site", "kind", "geometry", "param.", "MACs", "share", "rules")
    table = _table(headers, cells, (22, 10, 18, 8, 7, 8, 23), "lllrrrl")
    notes = "\n".join(_filled(f"[{number}] {reason}", "    ") for reason, number in reasons.items())
    return "\n\n".join(part for part in (table, notes) if part) + "\n"


def _verdicts(row: AnalysisRow, reasons: dict[str, int]) -> str:
    """``yes: a, b; no: c [1]``, or ``yes: all``; a reason that is new gets the next number."""
    taken = [rule for rule, verdict in row.applies.items() if verdict == "yes"]
    refused = [
        f"{rule} [{reasons.setdefault(verdict, len(reasons) + 1)}]"
        for rule, verdict in row.applies.items()
        if verdict != "yes"
    ]
    if len(taken) == len(row.applies) > 1:
        return "yes: all"
    if len(refused) == len(row.applies) > 1 and len(set(row.applies.values())) == 1:
        return f"no: all [{reasons[row.applies[next(iter(row.applies))]]}]"
    parts = [f"{word}: {', '.join(rules)}" for word, rules in (("yes", taken), ("no", refused)) if rules]
    return "; ".join(parts)


def _sites(sites: Sequence[SiteRow]) -> str:
    if not sites:
        return "No convolutions were found."
    headers = ("site", "kind", "geometry", "decision", "MACs\nbefore", "MACs\nratio", "param.\nratio", "output\nerror")
    rows = [_site_cells(site) for site in sites]
    table = _table(headers, rows, (16, 10, 14, 25, 7, 6, 6, 8), "llllrrrr")
    bases = [text for basis, text in _BASIS_LEGEND.items() if any(site.error_basis == basis for site in sites)]
    legend = _filled(f"output error: relative, {'; '.join(bases)}") if bases else ""
    return _titled("Sites", "\n".join(part for part in (table, legend) if part))


def _site_cells(site: SiteRow) -> tuple[str, ...]:
    rewritten = site.action == "rewritten"
    return (
        site.name,
        site.kind,
        site.geometry + figures.calls(site.calls),
        figures.decision(site),
        figures.count(site.macs_before),
        _ratio(site.macs_before, site.macs_after) if rewritten else "",
        _ratio(site.parameters_before, site.parameters_after) if rewritten else "",
        _error(site),
    )


def _ratio(before: int, after: int) -> str:
    return figures.times(after / before) if before else "-"


def _error(site: SiteRow) -> str:
    if site.output_error is None or site.error_basis is None:
        return figures.NOT_MEASURED if site.action == "rewritten" else ""
    return figures.percent(site.output_error) + _BASIS_MARKS[site.error_basis]


def _asked(report: Report) -> str:
    rows = figures.asked_rows(report)
    return _titled("Asked and reached", _table(figures.ASKED_HEADERS, rows, (20, 40, 40), "lll")) if rows else ""


def _fidelity(report: Report) -> str:
    title = "Fidelity: rewritten against original"
    if not report.fidelity:
        return _titled(title, figures.NOT_MEASURED)
    basis = _filled(figures.fidelity_basis(report))
    headers, rows = figures.fidelity_table(report)
    widths = [FIDELITY_WIDTHS[header] for header in headers]
    table = _table(headers, rows, widths, "ll" + "r" * (len(headers) - 2))
    taken = [_filled(sentence, "  ") for sentence in figures.output_sentences(report)]
    return _titled(title, "\n".join((table, basis, *taken)))


def _parity(report: Report) -> str:
    title = figures.parity_title(report)
    if not report.parity:
        return _titled(title, figures.NOT_MEASURED)
    headers, rows = figures.parity_table(report)
    widths = (40, 20, 14, 9, 6) if len(headers) == 5 else (31, 20, 14, 13, 9, 6)
    return _titled(title, _table(headers, rows, widths, "l" + "r" * (len(headers) - 2) + "l"))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], alignment: str) -> str:
    """A table whose cells are wrapped to the widths; the alignment has one of ``l`` and ``r`` for every column."""
    wrapped = [[_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    names = ["right" if letter == "r" else "left" for letter in alignment]
    letters = sorted({letter for row in wrapped for cell in row for letter in cell if not letter.isascii()})
    narrow = {ord(letter): chr(STAND_INS + index) for index, letter in enumerate(letters)}
    cells = [[cell.translate(narrow) for cell in row] for row in wrapped]
    table: str = tabulate(cells, headers, tablefmt="simple", disable_numparse=True, colalign=names)
    return table.translate({ord(stand_in): chr(letter) for letter, stand_in in narrow.items()})


def _wrapped(cell: str, width: int) -> str:
    return "\n".join(textwrap.wrap(cell, width, break_on_hyphens=False))


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _titled(title: str, body: str) -> str:
    return f"{title}\n{body}" if body else ""
