"""A plan for the terminal: as a whole, and one site with everything that was measured there."""

from collections.abc import Sequence

from convrewrite.planning import Considered, Plan, PlannedSite
from convrewrite.reporting import figures
from convrewrite.reporting.site_tables import KIND, Column, decisions, site_table
from convrewrite.tables import WIDTH, filled, table

CONSIDERED_HEADERS = ("", "option", "MACs", "param.", "time", "error", "effect", "")
"""Columns of the table of options; empty ones are not shown."""

EFFECTS = (
    "Errors and effects are those with only this site rewritten. The effect is the KL of class scores and probabilities, the "
    "part of the variance of values that is lost, or the squared distance of embeddings; of several outputs the weighted mean."
)


def render_plan(plan: Plan, site: str | None = None, width: int = WIDTH) -> str:
    """What was asked, what the plan promises, and every site; or why one ``site`` became what it is. Where there is more
    ``width``, tables say more. Raises PlanError for a site that the plan does not have."""
    if site is not None:
        return render_site(plan.site(site), width)
    constraints = plan.asked()
    parts = [f"{name}={part:g}" for name, part in constraints.budget.items()] + (
        [f"keep {constraints.keep}"] if constraints.keep else []
    )
    lines = [f"asked: {', '.join(parts) or 'the ratio of each rule'}"]
    if plan.predicted is not None:
        p = plan.predicted
        latency = "" if p.latency is None else f", latency {p.latency:.3f}"
        lines.append(
            f"promised: macs {p.macs:.3f}, params {p.params:.3f}{latency}; effect on the outputs {p.effect:.2g}"
        )
    return "\n".join((*map(filled, lines), "", _sites(plan.sites, width)))


def _sites(sites: Sequence[PlannedSite], width: int) -> str:
    columns = [
        Column("site", [site.name for site in sites]),
        Column(KIND, [site.kind for site in sites]),
        Column("geometry", [site.geometry for site in sites]),
        Column("MACs", [_ratio(site) for site in sites], "r"),
    ]
    options = [None if site.option is None else site.becomes for site in sites]
    return site_table(columns, decisions("becomes", options, [site.reason for site in sites]), width)


def render_site(site: PlannedSite, width: int = WIDTH) -> str:
    """Why a site became what it is; columns of what was not measured are left out, and reasons are below the table."""
    head = f"{site.name}: {site.kind} {site.geometry}\n{site.becomes}"
    if not site.considered:
        return head
    reasons: dict[str, int] = {}
    rows = [_row(site, entry, reasons) for entry in site.considered]
    shown = [i for i in range(len(CONSIDERED_HEADERS)) if any(row[i] for row in rows)]
    cells = [[row[i] for i in shown] for row in rows]
    sides = "".join("llrrlrrl"[i] for i in shown)
    text = table([CONSIDERED_HEADERS[i] for i in shown], cells, sides, width)
    notes = [f"[{number}] {reason}" for reason, number in reasons.items()]
    if any(entry.effect is not None for entry in site.considered):
        notes.append(EFFECTS)
    return "\n".join((head, "", text, *map(filled, notes)))


def _row(site: PlannedSite, entry: Considered, reasons: dict[str, int]) -> tuple[str, ...]:
    return (
        ">" if entry.option == site.option else "",
        entry.option.option().describe(),
        _part(entry.macs, site.macs),
        _part(entry.parameters, site.parameters),
        ""
        if entry.seconds is None
        else f"{figures.duration(entry.seconds)} {_part(entry.seconds, site.seconds)}".strip(),
        figures.cell(entry.error, figures.percent),
        figures.cell(entry.effect, ".2g"),
        f"[{reasons.setdefault(entry.reason, len(reasons) + 1)}]" if entry.reason else "",
    )


def _part(value: float, whole: float | None) -> str:
    return "" if not whole else figures.times(value / whole)


def _ratio(site: PlannedSite) -> str:
    chosen = [entry.macs for entry in site.considered if entry.option == site.option]
    return _part(chosen[0], site.macs) if chosen else ""
