"""Results side by side."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from convrewrite.reporting import figures
from convrewrite.reporting.html import rendered
from convrewrite.reporting.report import Report
from convrewrite.tables import shortened, table
from convrewrite.worst import Worst

HEADERS = ("result", "model", "MACs", "param.", "latency", "agreement", "KL", "error", "")


class ComparedResult(BaseModel):
    """One result: what is left of its original's cost, and the agreement, KL (nats) and relative error of its worst output.

    ``basis`` says on which inputs these were measured; ``useless`` why it does not compute the same any more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str
    macs: float
    parameters: float
    latency: float | None
    agreement: float | None
    kl: float | None
    error: float | None
    refused: str | None
    useless: str | None = None
    basis: str | None = None

    @classmethod
    def of(cls, name: str, report: Report) -> "ComparedResult":
        """From a result's report."""
        totals, latency, worst = report.totals, report.totals.onnx_latency_seconds, Worst.of(report.fidelity)
        return cls(
            name=name,
            model=report.model,
            macs=totals.macs.ratio,
            parameters=totals.parameters.ratio,
            latency=None if latency is None else latency.ratio,
            agreement=worst.agreement,
            kl=worst.kl,
            error=worst.error,
            refused=report.refused,
            useless=report.warnings[0] if report.useless else None,
            basis=report.fidelity_basis,
        )


class Compared(BaseModel):
    """Results side by side, in the order they were named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    results: tuple[ComparedResult, ...]

    @classmethod
    def of(cls, named: Sequence[tuple[str, Report]]) -> "Compared":
        """From reports and what to call them."""
        return cls(results=tuple(ComparedResult.of(name, report) for name, report in named))

    def text(self) -> str:
        """For the terminal; notes on results are below the table."""
        return "\n".join((table(HEADERS, self._rows(), "llrrrrrrl"), *map(shortened, self._notes())))

    def page(self) -> str:
        """As an HTML page without outside references."""
        return rendered("compared.html.j2", headers=HEADERS, rows=self._rows(), notes=self._notes())

    def _notes(self) -> list[str]:
        """Why results are no success or of no use; and on what fidelity was measured, where that was not the same for all."""
        notes = [f"{r.name}: {r.refused or r.useless}" for r in self.results if r.refused or r.useless]
        bases = {r.name: r.basis for r in self.results if r.basis}
        if len(set(bases.values())) > 1:
            notes += [f"{name}: {basis}" for name, basis in bases.items()]
        return notes

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                r.name,
                r.model,
                figures.times(r.macs),
                figures.times(r.parameters),
                figures.cell(r.latency, figures.times),
                figures.cell(r.agreement, figures.percent),
                figures.cell(r.kl, ".3g"),
                figures.cell(r.error, figures.percent),
                "refused" if r.refused else "useless" if r.useless else "",
            )
            for r in self.results
        ]
