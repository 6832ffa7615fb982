"""The report for a terminal: plain tables, at most as wide as the terminal, and sentences of 80 columns."""

from collections.abc import Sequence
from typing import NamedTuple

from convrewrite.reporting import figures
from convrewrite.reporting.report import AnalysisRow, Report, SiteRow
from convrewrite.reporting.site_tables import KIND, PARAMETERS, Column, decisions, site_table, verdicts
from convrewrite.tables import WIDTH, filled, table


class _Basis(NamedTuple):
    """What errors were measured on, and its mark where several bases are in one table."""

    mark: str
    words: str


_BASES: dict[str, _Basis] = {
    "held-out inputs": _Basis("", "on held-out inputs"),
    "fitted inputs": _Basis("f", "on the inputs that were fitted on"),
    "synthetic inputs": _Basis("s", "on synthetic inputs"),
    "weights": _Basis("w", "of the weights alone, without inputs"),
}


def render_text(report: Report, *, exports_only: bool = False, width: int = WIDTH) -> str:
    """The whole report, or only what it says of other forms, ending in a newline. Where there is more ``width``, the table of
    sites says more."""
    if exports_only:
        return f"{_exports(report)}\n"
    intro = [
        figures.headline(report),
        f"Input {figures.shapes(report)}; rules: {figures.joined(report.rules)}.",
        figures.calibration_sentence(report),
    ]
    sections = [
        "\n".join(map(filled, figures.failures(report))),
        _titled("Warnings", "\n".join(filled(f"- {warning}", "  ") for warning in report.warnings)),
        "\n".join(map(filled, intro)),
        _sites(report.sites, width),
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
    return _titled("Exports: other forms against the result", "\n".join((forms, *told)))


def render_sites(rows: Sequence[AnalysisRow], width: int = WIDTH) -> str:
    """The sites of a model with their costs, and which rules would take them; the reasons are below the table."""
    if not rows:
        return "No convolutions were found.\n"
    columns = [
        *_geometry(rows),
        Column("param.", [figures.count(row.parameters) for row in rows], "r"),
        Column("MACs", [figures.count(row.macs) for row in rows], "r"),
        Column("share", [figures.percent(row.mac_share) for row in rows], "r"),
    ]
    return site_table(columns, verdicts([row.applies for row in rows]), width) + "\n"


def _geometry(rows: Sequence[AnalysisRow] | Sequence[SiteRow]) -> list[Column]:
    calls = [row.calls for row in rows]
    return [
        Column("site", [row.name for row in rows]),
        Column(KIND, [row.kind for row in rows]),
        Column("geometry", [row.geometry for row in rows]),
        Column("calls", [str(number) for number in calls] if max(calls) > 1 else [], "r"),
    ]


def _sites(sites: Sequence[SiteRow], width: int) -> str:
    if not sites:
        return "No convolutions were found."
    rewritten = [site.action == "rewritten" for site in sites]
    macs = [_ratio(site.macs_before, site.macs_after) for site in sites]
    parameters = [_ratio(site.parameters_before, site.parameters_after) for site in sites]
    bases = [basis for basis in _BASES if any(site.error_basis == basis for site in sites)]
    columns = [
        *_geometry(sites),
        Column("MACs before", [figures.count(site.macs_before) for site in sites], "r"),
        Column("MACs ratio", _where(rewritten, macs), "r"),
        Column(PARAMETERS, _where(rewritten, parameters), "r"),
        Column("output error", [_error(site, bases) for site in sites], "r"),
    ]
    forms = decisions("decision", [site.option for site in sites], [site.reason for site in sites])
    return _titled("Sites", site_table(columns, forms, width, _error_legend(sites, bases)))


def _error(site: SiteRow, bases: Sequence[str]) -> str:
    """The error, with a mark of what it was measured on where that is not the same for all."""
    if site.output_error is None or site.error_basis is None:
        return figures.DOES_NOT_APPLY if site.action == "rewritten" and bases else ""
    mark = f" {_BASES[site.error_basis].mark}" if len(bases) > 1 else ""
    return figures.percent(site.output_error) + mark.rstrip()


def _error_legend(sites: Sequence[SiteRow], bases: Sequence[str]) -> list[str]:
    unmeasured = any(site.action == "rewritten" and site.output_error is None for site in sites)
    if not bases:
        return [f"output error: {figures.NOT_MEASURED}"] if unmeasured else []
    marked = len(bases) > 1
    told = [f"{_BASES[b].mark}: {_BASES[b].words}" if marked and _BASES[b].mark else _BASES[b].words for b in bases]
    dash = [f"{figures.DOES_NOT_APPLY}: {figures.NOT_MEASURED}"] if unmeasured else []
    return [f"output error: relative, {'; '.join([*told, *dash])}"]


def _where(wanted: Sequence[bool], cells: Sequence[str]) -> list[str]:
    return [cell if shown else "" for shown, cell in zip(wanted, cells, strict=True)]


def _ratio(before: int, after: int) -> str:
    return figures.times(after / before) if before else "-"


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
