"""What a page shows of a result, as values: a report and its plan, side by side, site after site."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from convrewrite.planning import Considered, Plan, PlannedSite
from convrewrite.reporting import figures
from convrewrite.reporting.charts import ErrorPoint
from convrewrite.reporting.report import LatencyChange, Report, SiteRow
from convrewrite.values import shift
from convrewrite.worst import Worst

Basis = Literal["time", "MACs"]

MOST_RULED_OUT = 12
"""Most options of a site that a page lists of those without a measured effect; the plan has all of them."""

MOSTLY = 0.5
"""Part of the MACs whose time must have been measured for the blocks to be drawn by time."""

MINUS = "\N{MINUS SIGN}"


class Cell(NamedTuple):
    """The text of a cell in a table, and the value it is sorted by."""

    text: str
    value: float | str


class Tile(NamedTuple):
    """One of the figures at the top: the number, what it is, and where it comes from."""

    figure: str
    label: str
    detail: str


@dataclass(frozen=True, slots=True)
class OptionRow:
    """An option that was looked at: its cost, error and effect, and why it was not taken; empty where nothing was measured."""

    option: str
    macs: str
    parameters: str
    time: str
    error: str
    effect: str
    why: str
    chosen: bool


@dataclass(frozen=True, slots=True)
class SiteView:
    """One site. ``before`` and ``after`` are its cost on the basis of the page, None where it has none."""

    place: int
    row: SiteRow
    cells: tuple[Cell, ...]
    before: float | None
    after: float | None
    tip: str
    facts: tuple[tuple[str, str], ...]
    options: tuple[OptionRow, ...]
    ruled_out: tuple[OptionRow, ...]
    more: int
    """Options beyond those of ``ruled_out``."""


@dataclass(frozen=True, slots=True)
class View:
    """The whole page. ``before`` and ``after`` are the sums of the blocks."""

    basis: Basis
    before: float
    after: float
    sites: tuple[SiteView, ...]
    tiles: tuple[Tile, ...]
    kinds: tuple[str, ...]
    promises: tuple[tuple[str, str, str], ...]
    points: tuple[ErrorPoint, ...]

    def cost(self, value: float) -> str:
        """A cost on the basis of the page, as a person reads it."""
        return figures.duration(value) if self.basis == "time" and value else figures.count(value)


SITE_COLUMNS = (
    ("#", True), ("site", False), ("kind", False), ("geometry", False), ("decision", False), ("parameters", True),
    ("after", True), ("MACs", True), ("after", True), ("ratio", True), ("error", True), ("per unknown", True),
)  # fmt: skip
"""Headers of the table of sites, and whether their columns hold numbers."""


def view_of(report: Report, plan: Plan | None) -> View:
    """What the page of a report shows; without its plan, reasons and options are left out."""
    planned = {site.name: site for site in plan.sites} if plan else {}
    pairs = [(row, planned.get(row.name)) for row in report.sites]
    basis = _basis(pairs)
    sites = tuple(_site(place, row, site, basis) for place, (row, site) in enumerate(pairs, 1))
    return View(
        basis=basis,
        before=sum(site.before or 0.0 for site in sites),
        after=sum(site.after or 0.0 for site in sites),
        sites=sites,
        tiles=tiles(report),
        kinds=tuple(dict.fromkeys(row.kind for row in report.sites)),
        promises=_promises(report, plan),
        points=tuple(
            ErrorPoint(place, getattr(_chosen(site), "error", None), row.output_error)
            for place, (row, site) in enumerate(pairs, 1)
            if row.action == "rewritten"
        ),
    )


def tiles(report: Report) -> tuple[Tile, ...]:
    """The headline in three figures: what is saved of time (otherwise of MACs), of parameters, and how much stayed the same."""
    totals, latency = report.totals, report.totals.onnx_latency_seconds
    if latency is None:
        cost = Tile(
            _less(totals.macs.ratio), "MACs", f"{figures.count(totals.macs.before)} to {figures.count(totals.macs.after)}; "
            f"latency {figures.NOT_MEASURED}",
        )  # fmt: skip
    else:
        cost = Tile(_less(latency.ratio), figures.latency_name(report), _latency(latency))
    counts = totals.parameters
    parameters = Tile(
        _less(counts.ratio), "parameters", f"{figures.count(counts.before)} to {figures.count(counts.after)}"
    )
    return (cost, parameters, _fidelity(report))


def _less(ratio: float) -> str:
    if not math.isfinite(ratio):  # of nothing
        return figures.times(ratio)
    change = shift(ratio)
    return "0 %" if change == "+0" else f"{change.replace('-', MINUS)} %"


def _latency(latency: LatencyChange) -> str:
    low, high = map(figures.times, latency.quartiles)
    return f"{figures.duration(latency.before)} to {figures.duration(latency.after)}; ratio {low} to {high}"


def _fidelity(report: Report) -> Tile:
    if not report.fidelity:
        return Tile("?", "fidelity", figures.NOT_MEASURED)
    basis, worst = figures.fidelity_basis(report), Worst.of(report.fidelity)
    if worst.number_error is None:
        assert worst.equal is not None, "outputs are numbers, or integers that can be equal"
        return Tile(figures.percent(worst.equal), "entries stayed equal", basis)
    error = figures.percent(worst.number_error)
    if worst.agreement is None:
        return Tile(error, "relative output error", basis)
    return Tile(figures.percent(worst.agreement), "top-1 agreement", f"relative error {error}; {basis}")


def _chosen(site: PlannedSite | None) -> Considered | None:
    if site is None or site.option is None:
        return None
    return next((entry for entry in site.considered if entry.option == site.option), None)


def _basis(pairs: Sequence[tuple[SiteRow, PlannedSite | None]]) -> Basis:
    """Time, if it was measured for most of the original's MACs, and for all options that were chosen; otherwise MACs."""
    timed = sum(row.macs_before for row, site in pairs if site is not None and site.seconds)
    complete = all(row.action == "kept" or ((found := _chosen(site)) and found.seconds) for row, site in pairs)
    return "time" if complete and timed > MOSTLY * sum(row.macs_before for row, _ in pairs) else "MACs"


def _costs(row: SiteRow, site: PlannedSite | None, basis: Basis) -> tuple[float | None, float | None]:
    if basis == "MACs":
        return row.macs_before, row.macs_after
    chosen, before = _chosen(site), None if site is None else site.seconds
    if row.action == "kept":
        return before, before
    return before, None if chosen is None else chosen.seconds


def _site(place: int, row: SiteRow, site: PlannedSite | None, basis: Basis) -> SiteView:
    before, after = _costs(row, site, basis)
    chosen = _chosen(site)
    considered = site.considered if site else ()
    open_ = [entry for entry in considered if entry == chosen or entry.effect is not None]
    out = [entry for entry in considered if entry not in open_]
    rows = [_option(entry, site, chosen) for entry in (*open_, *out) if site is not None]
    inside, outside = rows[: len(open_)], rows[len(open_) :]
    cost = figures.duration if basis == "time" else figures.count
    told = f"{cost(before)} to {cost(after)}" if before and after else "not timed" if basis == "time" else "no MACs"
    return SiteView(
        place=place,
        row=row,
        cells=_cells(place, row),
        before=before,
        after=after,
        tip=f"{row.name}: {row.kind} {row.geometry}; {told}; {figures.decision(row)}",
        facts=_facts(row, site, chosen),
        options=tuple(inside),
        ruled_out=tuple(outside[:MOST_RULED_OUT]),
        more=max(0, len(outside) - MOST_RULED_OUT),
    )


def _cells(place: int, row: SiteRow) -> tuple[Cell, ...]:
    texts = figures.site_cells(row)
    ratio = row.macs_after / row.macs_before if row.macs_before else 1.0
    per_unknown = row.positions / row.unknowns if row.positions and row.unknowns else -1.0
    error = -1.0 if row.output_error is None else row.output_error
    values: tuple[float | str, ...] = (
        row.name, row.kind, row.geometry, figures.decision(row), row.parameters_before, row.parameters_after,
        row.macs_before, row.macs_after, ratio, error, "", per_unknown,
    )  # fmt: skip
    cells = [Cell(text, value) for text, value in zip(texts, values, strict=True)]
    return (Cell(str(place), place), *cells[:10], cells[11])


def _facts(row: SiteRow, site: PlannedSite | None, chosen: Considered | None) -> tuple[tuple[str, str], ...]:
    facts = [
        ("kind", row.kind),
        ("geometry", row.geometry + figures.calls(row.calls)),
        ("MACs", _arrow(figures.count(row.macs_before), figures.count(row.macs_after))),
        ("parameters", _arrow(figures.count(row.parameters_before), figures.count(row.parameters_after))),
    ]
    if site is not None and site.seconds:
        after = None if row.action == "kept" else chosen and chosen.seconds
        facts.append(("time alone", _arrow(figures.duration(site.seconds), figures.duration(after) if after else "")))
    if chosen is not None and chosen.error is not None:
        facts.append(("error expected", figures.percent(chosen.error)))
    if row.output_error is not None:
        facts.append(("error measured", f"{figures.percent(row.output_error)} on {row.error_basis}"))
    if row.positions and row.unknowns:
        facts.append(
            ("fitted on", f"{figures.count(row.positions)} positions for {figures.count(row.unknowns)} unknowns")
        )
    if site is not None and site.batch_norm:
        facts.append(("folded in", site.batch_norm))
    return tuple(facts)


def _arrow(before: str, after: str) -> str:
    return before if after in ("", before) else f"{before} to {after}"


def _option(entry: Considered, site: PlannedSite, chosen: Considered | None) -> OptionRow:
    seconds = entry.seconds
    return OptionRow(
        option=entry.option.option().describe(),
        macs=_of(entry.macs, site.macs, figures.count(entry.macs)),
        parameters=_of(entry.parameters, site.parameters, figures.count(entry.parameters)),
        time="" if seconds is None else _of(seconds, site.seconds, figures.duration(seconds)),
        error=figures.cell(entry.error, figures.percent),
        effect=figures.cell(entry.effect, ".2g"),
        why=_why(entry, site, chosen),
        chosen=entry == chosen,
    )


def _of(value: float, whole: float | None, text: str) -> str:
    return f"{text} ({figures.times(value / whole)})" if whole else text


def _why(entry: Considered, site: PlannedSite, chosen: Considered | None) -> str:
    """Why an option was not taken: its own reason, otherwise how it compares with the one that was taken."""
    if entry == chosen:
        return "taken"
    if entry.reason:
        return entry.reason
    if chosen is None:
        return site.reason or ""
    costs = _compared(entry, chosen)
    if entry.effect is None or chosen.effect is None:
        return f"{costs[0].text} of the option taken"
    harm = entry.effect / chosen.effect if chosen.effect > 0 else float("inf")
    cheaper, dearer = [cost.text for cost in costs if cost.ratio < 1], [cost.text for cost in costs if cost.ratio > 1]
    if harm >= 1 and not cheaper:
        return f"no better in anything: {costs[0].text} and {_times(harm)} the harm of the option taken"
    if harm >= 1:
        return f"cheaper ({cheaper[0]}), but {_times(harm)} the harm: that saving does less harm at other sites"
    if dearer:
        return f"{_times(harm)} the harm, but {dearer[0]}: the difference is better spent at other sites"
    return f"{_times(harm)} the harm alone and {costs[0].text}, but behind the option taken in the model as a whole"


class _Cost(NamedTuple):
    """What an option costs of something, as a part of what another one does."""

    ratio: float
    text: str


def _compared(entry: Considered, chosen: Considered) -> list[_Cost]:
    """Time, where both were timed, then MACs and parameters."""
    pairs = (
        ("time", entry.seconds, chosen.seconds),
        ("MACs", entry.macs, max(1, chosen.macs)),
        ("parameters", entry.parameters, max(1, chosen.parameters)),
    )
    ratios = [(own / other, noun) for noun, own, other in pairs if own is not None and other]
    return [_Cost(ratio, f"{figures.times(ratio)} of the {noun}") for ratio, noun in ratios]


def _times(factor: float) -> str:
    """``3.1 times``, ``1/130 of``; no number for factors that are extremely small or large."""
    if factor == 0:
        return "none of"
    if not 1e-4 < factor < 1e4:
        return "a tiny part of" if factor < 1 else "a great many times"
    return f"{_short(factor)} times" if factor >= 1 else f"1/{_short(1 / factor)} of"


def _short(factor: float) -> str:
    return f"{factor:.1f}" if factor < 10 else f"{factor:.0f}"


def _promises(report: Report, plan: Plan | None) -> tuple[tuple[str, str, str], ...]:
    """What the choice expected, and what was measured."""
    predicted = plan.predicted if plan else None
    totals, rows = report.totals, list[tuple[str, str, str]]()
    if predicted is not None:
        rows += [
            ("MACs left", figures.times(predicted.macs), figures.times(totals.macs.ratio)),
            ("parameters left", figures.times(predicted.params), figures.times(totals.parameters.ratio)),
        ]
    latency = totals.onnx_latency_seconds
    if predicted is not None and predicted.latency is not None:
        rows.append(("latency left", figures.times(predicted.latency), figures.times(latency.ratio) if latency else ""))
    if totals.predicted_onnx_latency_seconds is not None and latency is not None:
        rows.append(
            (
                figures.latency_name(report),
                figures.duration(totals.predicted_onnx_latency_seconds),
                figures.duration(latency.after),
            )
        )
    kl = [row.kl for row in report.fidelity if row.kl is not None]
    if predicted is not None and len(report.fidelity) == len(kl) == 1:
        rows.append(("effect on the output (KL, nats)", f"{predicted.effect:.2g}", f"{kl[0]:.2g}"))
    return tuple(rows)
