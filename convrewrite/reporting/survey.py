"""What a page shows of a model that nothing was done to yet, as values."""

from collections.abc import Sequence
from dataclasses import dataclass

from convrewrite.reporting import figures
from convrewrite.reporting.page import Cell, Tile
from convrewrite.reporting.report import AnalysisRow
from convrewrite.values import counted

ANALYSIS_COLUMNS = (
    ("#", True), ("site", False), ("kind", False), ("geometry", False), ("parameters", True), ("MACs", True), ("share", True),
    ("rules that take it", False),
)  # fmt: skip
"""Headers of the table of a model that nothing was done to, and whether their columns hold numbers."""


@dataclass(frozen=True, slots=True)
class Found:
    """One site of such a model, with the rules that take it last among its cells."""

    place: int
    row: AnalysisRow
    cells: tuple[Cell, ...]
    tip: str


@dataclass(frozen=True, slots=True)
class Reach:
    """What a rule may touch: sites, and their part of the MACs, which is the most that it could save."""

    rule: str
    sites: int
    share: float


@dataclass(frozen=True, slots=True)
class Survey:
    """The whole page; ``macs`` and ``parameters`` are those of the convolutions."""

    sites: tuple[Found, ...]
    kinds: tuple[str, ...]
    macs: int
    parameters: int
    reach: tuple[Reach, ...]
    tiles: tuple[Tile, ...]


def survey_of(rows: Sequence[AnalysisRow]) -> Survey:
    """What the page of an untouched model shows."""
    rules = list(dict.fromkeys(rule for row in rows for rule in row.applies))
    taken = {rule: [row for row in rows if row.applies.get(rule) == "yes"] for rule in rules}
    reach = tuple(Reach(rule, len(of), sum(row.mac_share for row in of)) for rule, of in taken.items())
    macs, parameters = sum(row.macs for row in rows), sum(row.parameters for row in rows)
    return Survey(
        sites=tuple(_found(place, row) for place, row in enumerate(rows, 1)),
        kinds=tuple(dict.fromkeys(row.kind for row in rows)),
        macs=macs,
        parameters=parameters,
        reach=tuple(sorted(reach, key=lambda one: -one.share)),
        tiles=_survey_tiles(rows, macs, parameters, reach),
    )


def _survey_tiles(rows: Sequence[AnalysisRow], macs: int, parameters: int, reach: Sequence[Reach]) -> tuple[Tile, ...]:
    tiles = [
        Tile(figures.count(macs), "MACs in convolutions", f"{counted(len(rows), 'site')}, for one example"),
        Tile(figures.count(parameters), "parameters in convolutions", "with their biases"),
    ]
    if reach:
        best = max(reach, key=lambda one: one.share)
        told = f"of the MACs are in sites that the rule {best.rule} takes: {best.sites} of {len(rows)}"
        tiles.append(Tile(figures.percent(best.share), "within reach", told))
    return tuple(tiles)


def _found(place: int, row: AnalysisRow) -> Found:
    taken = ", ".join(rule for rule, verdict in row.applies.items() if verdict == "yes")
    share = figures.percent(row.mac_share)
    return Found(
        place=place,
        row=row,
        cells=(
            Cell(str(place), place),
            Cell(row.name, row.name),
            Cell(row.kind, row.kind),
            Cell(row.geometry + figures.calls(row.calls), row.geometry),
            Cell(figures.count(row.parameters), row.parameters),
            Cell(figures.count(row.macs), row.macs),
            Cell(share, row.mac_share),
            Cell(taken or "none", taken or "none"),
        ),
        tip=f"{row.name}: {row.kind} {row.geometry}; {share} of the MACs; {taken or 'no rule'}",
    )
