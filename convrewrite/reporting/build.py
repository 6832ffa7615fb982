"""From what the stages returned to the Report."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from convrewrite.calibration import Calibration
from convrewrite.conv import Cost
from convrewrite.machine import processor
from convrewrite.meanings import Fidelity
from convrewrite.planning import Plan
from convrewrite.reporting.report import (
    Asked,
    CalibrationSummary,
    Change,
    Environment,
    ErrorBasis,
    LatencyChange,
    OutputFidelityRow,
    OutputRow,
    ParityRow,
    Reached,
    RecoveredSummary,
    Report,
    SiteRow,
    Totals,
)
from convrewrite.reporting.verdict import few_positions, overfitted, refused, unheld, unshown, useless
from convrewrite.rewriting import Outcome, Work
from convrewrite.runtime import Measured
from convrewrite.settings import Constraints, Recovery
from convrewrite.targets import Comparison, target_of
from convrewrite.values import beside
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


def site_row(outcome: Outcome, kind: str) -> SiteRow:
    """One outcome as a row; ``kind`` is that of the calibration."""
    basis: ErrorBasis = ERROR_BASES[kind] if outcome.held_out or kind != "data" else "fitted inputs"
    site, candidate = outcome.site, outcome.candidate
    before = site.cost
    after = before if candidate is None else candidate.cost
    return SiteRow(
        name=site.name,
        kind=site.kind,
        geometry=site.spec.describe(),
        calls=site.calls,
        action="kept" if candidate is None else "rewritten",
        option=None if candidate is None else candidate.option.describe(),
        reason=(outcome.reason or "kept") if candidate is None else None,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        macs_before=before.macs,
        macs_after=after.macs,
        output_error=outcome.error,
        error_basis=None if outcome.error is None else basis,
        positions=outcome.positions,
        unknowns=None if outcome.positions is None else outcome.unknowns,
    )


def build_report(
    *,
    model: str,
    plan: Plan,
    constraints: Constraints,
    work: Work,
    outcomes: Sequence[Outcome],
    costs: tuple[Cost, Cost],
    measured: Measured,
    notes: Sequence[str],
) -> Report:
    """Put everything together; ``costs`` are those of the whole model before and after."""
    before, after = costs
    calibration, settings = work.data, work.settings
    parts = _parts(before, after, measured)
    lost = useless(constraints, measured, calibration, fast=settings.fast, left=parts["macs"])
    return Report(
        tool_version=tool_version(),
        model=model,
        input_shapes=tuple(tuple(tensor.shape) for tensor in work.prepared.inputs),
        rules=plan.rules,
        asked=Asked(
            budget=dict(constraints.budget),
            keep=None if constraints.keep is None else str(constraints.keep),
            opset=settings.opset,
            free_axes=settings.free_axes,
        ),
        reached=Reached(
            budget={name: parts[name] for name in constraints.budget}, keep=_kept(constraints, measured.fidelity)
        ),
        refused=refused(constraints, measured, lost, parts, plan.rules),
        useless=lost is not None,
        warnings=(
            *([lost] if lost else []),
            *unheld(constraints, measured.fidelity),
            *unshown(measured),
            *few_positions(outcomes),
            *overfitted(outcomes),
        ),
        seed=plan.seed,
        threads=settings.threads_timed,
        calibration=CalibrationSummary(
            source=calibration.source,
            kind=calibration.kind,
            fitted_on=calibration.fitted_on,
            held_out=calibration.held_out_count,
        ),
        sites=tuple(site_row(outcome, calibration.kind) for outcome in outcomes),
        totals=_totals(before, after, measured),
        outputs=_output_rows(measured.fidelity),
        fidelity=_fidelity_rows(measured.fidelity),
        fidelity_examples=measured.fidelity.examples,
        fidelity_basis=measured.fidelity_basis,
        parity=_parity_rows(measured),
        runtime=settings.runtime,
        runtime_version=None if settings.timings else settings.target.version(),
        environment=environment(),
        notes=(*notes, *_left_out(measured.fidelity)),
        seconds=work.watch.seconds,
    )


def recovered_report(
    report: Report,
    *,
    plan: Plan,
    asked: Recovery,
    measured: Measured,
    data: Calibration,
    summary: RecoveredSummary,
    notes: Sequence[str],
    seconds: Mapping[str, float],
) -> Report:
    """The report of a recovered result: costs, sites and calibration as they were, and what was measured anew. Errors of single
    sites belong to the plan's fit, and exported forms to the model before: both are left out where factors were trained since.
    ``data`` are the inputs of the recovery."""
    constraints = plan.asked()
    before, after = Cost(*_pair(report, "before")), Cost(*_pair(report, "after"))
    parts = _parts(before, after, measured)
    lost = useless(constraints, measured, data, fast=False, left=parts["macs"])
    stale = not summary.unchanged
    sites = tuple(
        site.model_copy(update={"output_error": None, "error_basis": None}) if stale and site.option else site
        for site in report.sites
    )
    anew = (*unheld(constraints, measured.fidelity), *unshown(measured))
    earlier = anew if stale else report.warnings[1 if report.useless else 0 :]
    fields = {name: getattr(report, name) for name in type(report).model_fields}
    fields |= {
        "sites": sites,
        "totals": _totals(before, after, measured),
        "reached": Reached(
            budget={name: parts[name] for name in constraints.budget}, keep=_kept(constraints, measured.fidelity)
        ),
        "refused": refused(constraints, measured, lost, parts, plan.rules),
        "useless": lost is not None,
        "warnings": (*([lost] if lost else []), *earlier),
        "threads": asked.threads,
        "outputs": _output_rows(measured.fidelity),
        "fidelity": _fidelity_rows(measured.fidelity),
        "fidelity_examples": measured.fidelity.examples,
        "fidelity_basis": measured.fidelity_basis,
        "parity": _parity_rows(measured),
        "runtime_version": report.runtime_version
        if measured.onnx_latency is None
        else target_of(report.runtime).version(),
        "recovered": summary,
        "exports": () if stale else tuple(row for row in report.exports if row.files),
        "digests": {},
        "environment": environment(),
        "notes": tuple(dict.fromkeys((*report.notes, *notes, *measured.notes, *_left_out(measured.fidelity)))),
        "seconds": dict(seconds),
    }
    return Report(**fields)


def _pair(report: Report, which: str) -> tuple[int, int]:
    """Parameters and MACs of the whole model, before or after."""
    return getattr(report.totals.parameters, which), getattr(report.totals.macs, which)


def _parts(before: Cost, after: Cost, measured: Measured) -> dict[str, float | None]:
    """What is left of each resource."""
    latency = measured.onnx_latency
    return {
        "macs": after.macs / max(1, before.macs),
        "params": after.parameters / max(1, before.parameters),
        "latency": None if latency is None else latency.ratio,
    }


def _output_rows(fidelity: Fidelity) -> tuple[OutputRow, ...]:
    return tuple(
        OutputRow(name=name, taken_for=meaning.kind, reason=meaning.reason, weight=meaning.weight)
        for name, meaning in fidelity.meanings.items()
    )


def _fidelity_rows(fidelity: Fidelity) -> tuple[OutputFidelityRow, ...]:
    return tuple(
        OutputFidelityRow(
            name=o.name,
            relative_error=o.relative_error,
            top1_agreement=o.top1_agreement,
            kl=o.kl,
            equal_share=o.equal_share,
            cosine=o.cosine,
            unexplained=o.unexplained,
            taken_for=o.kind,
        )
        for o in fidelity.outputs
    )


def _kept(constraints: Constraints, fidelity: Fidelity) -> str | None:
    """The fidelity that was measured, in the words of the one that was to be kept; None where none was."""
    if constraints.keep is None:
        return None
    if constraints.keep.measure == "agreement" and fidelity.least_agreement is not None:
        return f"top-1 agreement of {beside(constraints.keep.limit, fidelity.least_agreement, '.4g')}"
    return f"relative output error of {beside(constraints.keep.limit, fidelity.worst_error, '.3g')}"


def _totals(before: Cost, after: Cost, measured: Measured) -> Totals:
    latency, saving = measured.onnx_latency, measured.predicted_saving
    whole = measured.original_seconds if latency is None else latency.seconds_a
    # Options that promise to save more than the whole time give no prediction that could be shown.
    predicted = whole * (1 - saving) if whole is not None and saving is not None and saving < 1 else None
    return Totals(
        parameters=Change[int](before=before.parameters, after=after.parameters),
        macs=Change[int](before=before.macs, after=after.macs),
        file_bytes=measured.file_bytes and Change[int](before=measured.file_bytes[0], after=measured.file_bytes[1]),
        onnx_latency_seconds=_latency(measured.onnx_latency),
        torch_latency_seconds=_latency(measured.torch_latency),
        predicted_onnx_latency_seconds=predicted,
        predicted_in=None if predicted is None else measured.original_runtime,
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


def _parity_rows(measured: Measured) -> tuple[ParityRow, ...]:
    if measured.parity is None:
        return ()
    return tuple(
        ParityRow(
            name=o.name,
            max_abs_difference=o.max_abs_difference,
            relative_error=o.relative_error,
            tolerance=o.tolerance,
            passed=o.passed,
            equal_share=o.equal_share,
            runtime=o.runtime,
        )
        for o in measured.parity.outputs
    )
