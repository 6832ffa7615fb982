"""The report for a terminal: plain tables, at most 80 columns wide."""

from collections.abc import Sequence

from convrewrite.reporting import figures
from convrewrite.reporting.report import AnalysisRow, Report, SiteRow
from convrewrite.tables import filled, table

_BASIS_MARKS = {"held-out inputs": "", "synthetic inputs": " s", "weights": " w"}
_BASIS_LEGEND = {
    "held-out inputs": "on held-out inputs",
    "synthetic inputs": "s: on synthetic inputs",
    "weights": "w: of the weights alone, without inputs",
}


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
        _titled("Warnings", "\n".join(filled(f"- {warning}", "  ") for warning in report.warnings)),
        "\n".join(map(filled, intro)),
        _sites(report.sites),
        _titled("Totals", table(figures.TOTALS_HEADERS, figures.totals_rows(report), "lrrl")),
        _asked(report),
        _fidelity(report),
        _titled(
            "Recovery", "\n".join(filled(f"- {sentence}", "  ") for sentence in figures.recovered_sentences(report))
        ),
        _parity(report),
        _exports(report),
        _titled("Notes", "\n".join(filled(f"- {note}", "  ") for note in report.notes)),
        _titled("Stages", filled(figures.stages_sentence(report))),
        filled(figures.environment_sentence(report)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _exports(report: Report) -> str:
    if not report.exports:
        return ""
    forms = table(figures.EXPORT_HEADERS, figures.export_rows(report), "llrrrrrl")
    told = [filled(sentence, "  ") for sentence in figures.export_sentences(report)]
    return _titled("Exports: other forms against torch", "\n".join((forms, *told)))


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
    sites = table(headers, cells, "lllrrrl")
    notes = "\n".join(filled(f"[{number}] {reason}", "    ") for reason, number in reasons.items())
    return "\n\n".join(part for part in (sites, notes) if part) + "\n"


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
    headers = ("site", "kind", "geometry", "decision", "MACs before", "MACs ratio", "param. ratio", "output error")
    drawn = table(headers, [_site_cells(site) for site in sites], "llllrrrr")
    bases = [text for basis, text in _BASIS_LEGEND.items() if any(site.error_basis == basis for site in sites)]
    legend = filled(f"output error: relative, {'; '.join(bases)}") if bases else ""
    return _titled("Sites", "\n".join(part for part in (drawn, legend) if part))


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
    return _titled("Asked and reached", table(figures.ASKED_HEADERS, rows, "lll")) if rows else ""


def _fidelity(report: Report) -> str:
    title = "Fidelity: rewritten against original"
    if not report.fidelity:
        return _titled(title, figures.NOT_MEASURED)
    basis = filled(figures.fidelity_basis(report))
    headers, rows = figures.fidelity_table(report)
    outputs = table(headers, rows, "ll" + "r" * (len(headers) - 2))
    taken = [filled(sentence, "  ") for sentence in figures.output_sentences(report)]
    return _titled(title, "\n".join((outputs, basis, *taken)))


def _parity(report: Report) -> str:
    title = figures.parity_title(report)
    if not report.parity:
        return _titled(title, figures.NOT_MEASURED)
    headers, rows = figures.parity_table(report)
    return _titled(title, table(headers, rows, "l" + "r" * (len(headers) - 2) + "l"))


def _titled(title: str, body: str) -> str:
    return f"{title}\n{body}" if body else ""
