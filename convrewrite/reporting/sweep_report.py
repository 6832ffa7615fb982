"""A sweep as a value: for every model its points, from little saved to much, and which of them is the knee."""

import html
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from tabulate import tabulate

from convrewrite.escaping import printable
from convrewrite.records import TextRecord
from convrewrite.reporting import figures
from convrewrite.tables import filled, table

Part = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]

HEADERS = ("", "budget", "MACs", "param.", "latency", "agreement", "KL", "error", "metric")


class SweepPoint(TextRecord):
    """One budget of one model, and what its plan, carried out, was measured to be.

    ``macs``, ``parameters`` and ``latency`` are what is left of the original's; ``agreement``, ``kl`` (nats) and ``error``, a
    relative one, are those of the worst output on held-out inputs. ``refused`` says why the result is no success, ``reason`` why
    there is no plan, where there is none. A point is ``beaten`` where another costs no more and loses less.
    """

    budget: Annotated[float, Field(gt=0, lt=1)]
    plan: str | None = None
    command: str | None = None
    macs: Part | None = None
    parameters: Part | None = None
    latency: Part | None = None
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    kl: Loss | None = None
    error: Loss | None = None
    metric: Number | None = None
    knee: bool = False
    beaten: bool = False
    refused: str | None = None
    reason: str | None = None

    @property
    def loss(self) -> float | None:
        """What points are compared by, the less the better: the KL, which still distinguishes points that agree in all classes;
        otherwise one minus the agreement, otherwise the error."""
        if self.kl is not None:
            return self.kl
        return self.error if self.agreement is None else 1 - self.agreement


class SweptModel(TextRecord):
    """One model, what it costs, the metric of the original, and its points, from the largest budget to the smallest."""

    name: str
    macs: Annotated[int, Field(ge=0)]
    parameters: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(gt=0)] | None = None
    metric: Number | None = None
    points: tuple[SweepPoint, ...]

    def marked(self, resource: str) -> "SweptModel":
        """The same model with points marked that others beat, and the knee of the rest, where that has one."""
        return self.model_copy(update={"points": with_knee(with_beaten(self.points, resource), resource)})


class SweepReport(TextRecord):
    """All of a sweep: ``resource`` is what the budgets are parts of, ``metric`` the name of the user's own, if there is one."""

    schema_version: Literal[1] = 1
    tool_version: str
    resource: Literal["macs", "params", "latency"]
    rules: tuple[str, ...]
    basis: str
    metric: str | None = None
    models: tuple[SweptModel, ...]

    def text(self) -> str:
        """The sweep for the terminal: one table per model, without empty columns; why points are missing, and why other points
        are no success."""
        parts = [_table(model, self.resource) for model in self.models]
        return "\n\n".join((*parts, filled(f"Fidelity was {self.basis}.")))

    def _repr_html_(self) -> str:
        """The same tables, as a notebook shows them."""
        tables = [
            f"<strong>{html.escape(printable(model.name))}</strong>{_html(model, self.resource)}"
            for model in self.models
        ]
        return "".join((*tables, f"<p>Fidelity was {html.escape(self.basis)}.</p>"))


def with_beaten(points: Sequence[SweepPoint], resource: str) -> tuple[SweepPoint, ...]:
    """The points with those marked that lie behind the frontier: another costs no more and loses less."""
    each = [(cost_of(point, resource), loss) for point, loss in zip(points, _losses(points), strict=True)]
    known = [(cost, loss) for cost, loss in each if cost is not None and loss is not None]

    def is_beaten(cost: float | None, lost: float | None) -> bool:
        return cost is not None and lost is not None and any(c <= cost and loss < lost for c, loss in known)

    return tuple(point.model_copy(update={"beaten": is_beaten(*own)}) for point, own in zip(points, each, strict=True))


def _losses(points: Sequence[SweepPoint]) -> list[float | None]:
    """The loss of every point, all in one unit. A result that lacks what others have loses more than any of them, as what it has
    is no number; and where there is no result there is no loss."""
    shares = [None if point.agreement is None else 1 - point.agreement for point in points]
    for losses in ([point.kl for point in points], shares, [point.error for point in points]):
        if any(loss is not None for loss in losses):
            return [
                math.inf if loss is None and point.macs is not None else loss
                for point, loss in zip(points, losses, strict=True)
            ]
    return [None] * len(points)


def with_knee(points: Sequence[SweepPoint], resource: str) -> tuple[SweepPoint, ...]:
    """The points with the knee marked, of those that none beats: the one farthest from the line between the ends, with both axes
    from 0 to 1, and below it; none where fewer than three are left or the curve is straight (Satopaa et al. 2011, "Kneedle")."""
    known = [(cost_of(p, resource), loss, p) for p, loss in zip(points, _losses(points), strict=True) if not p.beaten]
    curve = [
        (cost, loss, point)
        for cost, loss, point in known
        if cost is not None and loss is not None and math.isfinite(loss)
    ]
    plain = tuple(point.model_copy(update={"knee": False}) for point in points)
    if len(curve) < 3:
        return plain
    costs, losses = [cost for cost, _, _ in curve], [loss for _, loss, _ in curve]
    width, height = max(costs) - min(costs), max(losses) - min(losses)
    if width <= 0 or height <= 0:
        return plain
    below = [(1 - (cost - min(costs)) / width - (loss - min(losses)) / height, p) for cost, loss, p in curve]
    most, best = max(below, key=lambda pair: pair[0])
    return tuple(point.model_copy(update={"knee": point is best and most > 0}) for point in points)


def cost_of(point: SweepPoint, resource: str) -> float | None:
    """What is left of the resource that the budgets are parts of."""
    return {"macs": point.macs, "params": point.parameters, "latency": point.latency}[resource]


def sweep_rows(model: SweptModel) -> list[tuple[str, ...]]:
    """The points of a model as cells, under ``HEADERS``."""
    return [
        (
            "knee" if point.knee else "beaten" if point.beaten else "",
            f"{point.budget:g}",
            figures.cell(point.macs, figures.times),
            figures.cell(point.parameters, figures.times),
            figures.cell(point.latency, figures.times),
            figures.cell(point.agreement, figures.percent),
            figures.cell(point.kl, ".3g"),
            figures.cell(point.error, figures.percent),
            figures.cell(point.metric, ".4g"),
        )
        for point in model.points
    ]


def _table(model: SweptModel, resource: str) -> str:
    headers, cells = _shown(model)
    drawn = table(headers, cells, "l" * headers.count("") + "r" * (len(headers) - headers.count("")))
    return "\n".join((model.name, drawn, *map(filled, _troubles(model, resource))))


def _troubles(model: SweptModel, resource: str) -> list[str]:
    """Why points are missing, and why others are no success."""
    told = [(point, point.reason or (point.refused and f"no success: {point.refused}")) for point in model.points]
    return [f"{resource}={point.budget:g}: {why}" for point, why in told if why]


def _shown(model: SweptModel) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, without columns that hold nothing."""
    rows = sweep_rows(model)
    shown = [i for i in range(len(HEADERS)) if any(row[i] for row in rows)]
    return [HEADERS[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _html(model: SweptModel, resource: str) -> str:
    headers, cells = _shown(model)
    troubles = "".join(f"<p>{html.escape(printable(trouble))}</p>" for trouble in _troubles(model, resource))
    return tabulate(cells, headers, tablefmt="html", disable_numparse=True) + troubles
