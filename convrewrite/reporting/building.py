"""From what the stages returned to the Report."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from convrewrite.calibration import Calibration
from convrewrite.conv import Cost
from convrewrite.latency import Comparison
from convrewrite.measuring import Measured
from convrewrite.planning import OVERSTEP, Ask, Plan
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
from convrewrite.version import tool_version

ERROR_BASES: dict[str, ErrorBasis] = {
    "data": "held-out inputs",
    "synthetic": "synthetic inputs",
    "weights only": "weights",
}


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
    ask: Ask,
    threads: int,
    calibration: Calibration,
    outcomes: Sequence[Outcome],
    costs: tuple[Cost, Cost],
    measured: Measured,
    predicted_saving: float | None,
    notes: Sequence[str],
    seconds: dict[str, float],
) -> Report:
    """Put everything together; ``costs`` are those of the whole model before and after, ``predicted_saving`` the seconds
    that the options of the plan save according to their own times."""
    before, after = costs
    latency = measured.onnx_latency
    parts: dict[str, float | None] = {
        "macs": after.macs / max(1, before.macs),
        "params": after.parameters / max(1, before.parameters),
        "latency": None if latency is None else latency.ratio,
    }
    return Report(
        tool_version=tool_version(),
        model=model,
        input_shapes=tuple(input_shapes),
        rules=plan.rules,
        asked=Asked(budget=dict(ask.budget), keep=None if ask.keep is None else str(ask.keep)),
        reached=Reached(budget={name: parts[name] for name in ask.budget}, keep=_kept(ask, measured.fidelity)),
        refused=_refused(ask, measured),
        seed=plan.seed,
        threads=threads,
        calibration=CalibrationSummary(
            source=calibration.source,
            kind=calibration.kind,
            fitted_on=calibration.fitted_on,
            held_out=calibration.held_out_count,
        ),
        sites=tuple(site_row(outcome, ERROR_BASES[calibration.kind]) for outcome in outcomes),
        totals=_totals(before, after, measured, predicted_saving),
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


def _kept(ask: Ask, fidelity: Fidelity) -> str | None:
    """What was kept of what was asked to be kept, in the same words."""
    if ask.keep is None:
        return None
    agreements = [output.top1_agreement for output in fidelity.outputs if output.top1_agreement is not None]
    if ask.keep.measure == "agreement" and agreements:
        return f"top-1 agreement of {min(agreements):.4g}"
    return f"relative output error of {max(output.relative_error for output in fidelity.outputs):.3g}"


def _refused(ask: Ask, measured: Measured) -> str | None:
    """Why the result is no success, though everything ran."""
    latency, keep = measured.onnx_latency, ask.keep
    if ask.for_speed and latency is not None and measured.slower:
        return (
            f"the rewritten model is slower than the original: {latency.ratio:.2f} of its time in onnxruntime; "
            "use --rule balanced --budget latency=0.6, or ask for --budget macs or params alone if time does not matter"
        )
    wanted = ask.budget.get("latency")
    if wanted is not None and latency is not None and latency.ratio > OVERSTEP * wanted:
        return (
            f"asked for latency={wanted:g}, measured {latency.ratio:.2f} of the original's time in onnxruntime; "
            "ask for less, or repeat the run on a quieter machine"
        )
    fidelity = measured.fidelity.outputs
    agreements = [output.top1_agreement for output in fidelity if output.top1_agreement is not None]
    if keep is not None and keep.measure == "agreement" and agreements and min(agreements) < keep.limit:
        return f"asked to keep a {keep}, measured {min(agreements):.4g}; give the budget more room"
    if keep is not None and keep.measure == "error" and max(o.relative_error for o in fidelity) > keep.limit:
        return (
            f"asked to keep a {keep}, measured {max(o.relative_error for o in fidelity):.3g}; give the budget more room"
        )
    return None


def _totals(before: Cost, after: Cost, measured: Measured, predicted_saving: float | None) -> Totals:
    latency = measured.onnx_latency
    predicted = None if latency is None or predicted_saving is None else max(0.0, latency.seconds_a - predicted_saving)
    return Totals(
        parameters=Change[int](before=before.parameters, after=after.parameters),
        macs=Change[int](before=before.macs, after=after.macs),
        file_bytes=measured.file_bytes and Change[int](before=measured.file_bytes[0], after=measured.file_bytes[1]),
        onnx_latency_seconds=_latency(measured.onnx_latency),
        torch_latency_seconds=_latency(measured.torch_latency),
        predicted_onnx_latency_seconds=predicted,
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
