"""From what the stages returned to the Report."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from convrewrite.calibration import Calibration
from convrewrite.conv import Cost
from convrewrite.latency import Comparison
from convrewrite.planning import Plan
from convrewrite.reporting.model import (
    Asked,
    CalibrationSummary,
    Change,
    Environment,
    ErrorBasis,
    LatencyChange,
    OutputFidelityRow,
    ParityRow,
    Reached,
    Report,
    SiteRow,
    Totals,
)
from convrewrite.rewriting import Outcome
from convrewrite.timing_cache import processor
from convrewrite.verifying import Fidelity, Parity

ERROR_BASES: dict[str, ErrorBasis] = {
    "data": "held-out inputs",
    "synthetic": "synthetic inputs",
    "weights only": "weights",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on the finished model; None where nothing was."""

    fidelity: Fidelity
    fidelity_basis: str
    parity: Parity | None = None
    file_bytes: tuple[int, int] | None = None
    onnx_latency: Comparison | None = None
    torch_latency: Comparison | None = None


def tool_version() -> str:
    """The installed version of this package."""
    try:
        return version("convrewrite")
    except PackageNotFoundError:
        return "0+unknown"


def environment() -> Environment:
    """Versions and machine."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return Environment(
        python=platform.python_version(),
        torch=of("torch"),
        onnx=of("onnx"),
        onnxruntime=of("onnxruntime"),
        platform=platform.platform(),
        cpu=processor()[0],
        cores=os.cpu_count() or 1,
    )


def site_row(outcome: Outcome, error_basis: ErrorBasis) -> SiteRow:
    """One outcome as a row."""
    site, proposal = outcome.site, outcome.proposal
    before = site.cost
    after = before if proposal is None else proposal.cost
    return SiteRow(
        name=site.name,
        kind=site.kind,
        geometry=site.spec.describe(),
        calls=max(1, len(site.input_sizes)),
        action="kept" if proposal is None else "rewritten",
        option=None if proposal is None else proposal.option.describe(),
        reason=(outcome.reason or "kept") if proposal is None else None,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        macs_before=before.macs,
        macs_after=after.macs,
        output_error=outcome.error,
        error_basis=None if outcome.error is None else error_basis,
    )


def build_report(
    *,
    model: str,
    input_shapes: Sequence[tuple[int, ...]],
    plan: Plan,
    threads: int,
    calibration: Calibration,
    outcomes: Sequence[Outcome],
    costs: tuple[Cost, Cost],
    measured: Measured,
    notes: Sequence[str],
    seconds: dict[str, float],
) -> Report:
    """Put everything together; ``costs`` are those of the whole model, before and after."""
    before, after = costs
    parts = {"macs": after.macs / max(1, before.macs), "params": after.parameters / max(1, before.parameters)}
    return Report(
        tool_version=tool_version(),
        model=model,
        input_shapes=tuple(input_shapes),
        rules=plan.rules,
        asked=Asked(budget=plan.budget),
        reached=Reached(budget={name: parts[name] for name in plan.budget}),
        seed=plan.seed,
        threads=threads,
        calibration=CalibrationSummary(
            source=calibration.source,
            kind=calibration.kind,
            fitted_on=calibration.fitted_on,
            held_out=calibration.held_out_count,
        ),
        sites=tuple(site_row(outcome, ERROR_BASES[calibration.kind]) for outcome in outcomes),
        totals=_totals(before, after, measured),
        fidelity=tuple(
            OutputFidelityRow(
                name=o.name,
                relative_error=o.relative_error,
                top1_agreement=o.top1_agreement,
                kl=o.kl,
                equal_share=o.equal_share,
            )
            for o in measured.fidelity.outputs
        ),
        fidelity_examples=measured.fidelity.examples,
        fidelity_basis=measured.fidelity_basis,
        parity=_parity_rows(measured.parity),
        environment=environment(),
        notes=(*notes, *_left_out(measured.fidelity)),
        seconds=seconds,
    )


def _totals(before: Cost, after: Cost, measured: Measured) -> Totals:
    return Totals(
        parameters=Change[int](before=before.parameters, after=after.parameters),
        macs=Change[int](before=before.macs, after=after.macs),
        file_bytes=measured.file_bytes and Change[int](before=measured.file_bytes[0], after=measured.file_bytes[1]),
        onnx_latency_seconds=_latency(measured.onnx_latency),
        torch_latency_seconds=_latency(measured.torch_latency),
    )


def _latency(comparison: Comparison | None) -> LatencyChange | None:
    if comparison is None:
        return None
    return LatencyChange(
        before=comparison.seconds_a,
        after=comparison.seconds_b,
        ratio=comparison.ratio,
        quartiles=(comparison.ratio_low, comparison.ratio_high),
    )


def _left_out(fidelity: Fidelity) -> tuple[str, ...]:
    if not fidelity.left_out:
        return ()
    return (f"outputs that are no tensors are neither exported nor compared: {', '.join(fidelity.left_out)}",)


def _parity_rows(parity: Parity | None) -> tuple[ParityRow, ...]:
    if parity is None:
        return ()
    return tuple(
        ParityRow(
            name=o.name,
            max_abs_difference=o.max_abs_difference,
            relative_error=o.relative_error,
            tolerance=o.tolerance,
            passed=o.passed,
            equal_share=o.equal_share,
        )
        for o in parity.outputs
    )
