"""Numbers as a person reads them, and the rows and sentences that every form of the report shares."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from convrewrite.reporting.report import Change, LatencyChange, OutputFidelityRow, ParityRow, Report, SiteRow
from convrewrite.values import apart, beside, cosine, counted, shape_text, shift
from convrewrite.worst import Worst

NOT_MEASURED = "not measured"
DOES_NOT_APPLY = "-"

TOTALS_HEADERS = ("", "before", "after", "after / before")
FIDELITY_HEADERS = (
    "output", "taken for", "relative error", "unexplained variance", "top-1 agreement", "KL (nats)", "cosine", "equal entries",
)  # fmt: skip

OPTIONAL = ("unexplained variance", "cosine", "equal entries")
"""Columns that are left out where no output has them."""

PARITY_HEADERS = ("output", "max. abs. difference", "relative error", "equal entries", "tolerance", "")
EXPORT_HEADERS = ("form", "files", "size", "error to result", "tolerance", "error to original", "top-1 agreement", "")
CURVE_HEADERS = ("steps", "held-out effect")
ASKED_HEADERS = ("", "asked", "reached")
SITE_HEADERS = (
    "site", "kind", "geometry", "decision", "parameters before", "after", "MACs before", "after", "ratio",
    "output error", "measured on", "positions per unknown",
)  # fmt: skip


class Table(NamedTuple):
    """Headers, and rows of as many cells."""

    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]


def count(number: float) -> str:
    """Three significant digits: ``950``, ``45.6 k``, ``1.23 M``, ``1.82 G``."""
    if number < 999.5:
        return f"{number:.0f}"
    scaled = float(number)
    for unit in ("k", "M", "G"):
        scaled /= 1000
        if scaled < 999.5:
            return f"{_three_digits(scaled)} {unit}"
    return f"{_three_digits(scaled / 1000)} T"


def size(number: int) -> str:
    """Bytes in decimal units: ``950 B``, ``4.56 MB``."""
    return count(number) + ("B" if number >= 1000 else " B")


def duration(seconds: float) -> str:
    """``45.0 us``, ``3.90 ms`` or ``1.20 s``."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def times(ratio: float) -> str:
    """A ratio, after over before: ``0.38x``; nothing alone is ``0.00x``."""
    if ratio >= 0.095 or ratio == 0:
        return f"{ratio:.2f}x"
    return f"{ratio:.3f}x" if ratio >= 0.0005 else f"{ratio:.1g}x"


def cell(value: float | None, form: str | Callable[[float], str], otherwise: str = "") -> str:
    """A figure in a table, by a format or a function; ``otherwise`` where there is none."""
    if value is None:
        return otherwise
    return format(value, form) if isinstance(form, str) else form(value)


def percent(part: float) -> str:
    """A part of one: ``98.2 %``, ``3.2 %``, ``0.012 %``; less than all is never ``100.0 %``."""
    if abs(part) >= 10:
        return f"{100 * part:.0f} %"
    if abs(part) >= 0.095:
        return f"{min(100 * part, 99.9) if part < 1 else 100 * part:.1f} %"
    return f"{100 * part:.2g} %"


def change(ratio: float) -> str:
    """A ratio and what it means: ``0.38x (-62 %)``."""
    return f"{times(ratio)} ({shift(ratio)} %)"


def _three_digits(number: float) -> str:
    if number < 9.995:
        return f"{number:.2f}"
    return f"{number:.1f}" if number < 99.95 else f"{number:.0f}"


def shapes(report: Report) -> str:
    """The shapes of the model's inputs: ``1x3x224x224``."""
    return shape_text(*report.input_shapes) or "no inputs"


def decision(site: SiteRow) -> str:
    """The option that was applied, or why the site was kept."""
    return str(site.option) if site.action == "rewritten" else f"kept: {site.reason}"


def site_cells(site: SiteRow) -> tuple[str, ...]:
    """One site under :data:`SITE_HEADERS`."""
    rewritten = site.action == "rewritten"
    measured = None if site.output_error is None else percent(site.output_error)
    per_unknown = site.positions / site.unknowns if site.positions and site.unknowns else None
    return (
        site.name,
        site.kind,
        site.geometry + calls(site.calls),
        decision(site),
        count(site.parameters_before),
        count(site.parameters_after),
        count(site.macs_before),
        count(site.macs_after),
        times(site.macs_after / site.macs_before) if rewritten and site.macs_before else "",
        measured or (NOT_MEASURED if rewritten else ""),
        site.error_basis or "",
        cell(per_unknown, lambda number: count(number) if number >= 999.5 else f"{number:.3g}"),
    )


def totals_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Parameters, MACs, file size and latencies; a prediction has a row of its own that says so."""
    totals = report.totals
    rows = [
        _count_row("parameters", totals.parameters),
        _count_row("MACs of one example", totals.macs),
        _file_row(totals.file_bytes),
        _latency_row(latency_name(report), totals.onnx_latency_seconds),
    ]
    if totals.predicted_onnx_latency_seconds is not None:
        predicted = duration(totals.predicted_onnx_latency_seconds)
        rows.append((f"{_predicted_name(report)}, predicted", "", predicted, "a prediction"))
    return [*rows, _latency_row("torch latency", totals.torch_latency_seconds)]


def latency_name(report: Report) -> str:
    """What the latency is called: where it was measured."""
    return "ONNX latency" if report.runtime == "onnxruntime" else f"latency in {report.runtime}"


def _predicted_name(report: Report) -> str:
    """What the predicted latency is called: where nothing was timed here, it comes from times of another machine."""
    if report.totals.onnx_latency_seconds:
        return latency_name(report)
    runtime = report.totals.predicted_in  # reports of earlier versions do not say
    return "latency elsewhere" if runtime is None else f"latency elsewhere in {runtime}"


def parity_title(report: Report) -> str:
    """Which runtimes were held to torch."""
    others = dict.fromkeys(row.runtime for row in report.parity if row.runtime != "onnxruntime")
    return f"Parity: {' and '.join(['onnxruntime', *others])} against torch"


def _count_row(name: str, counts: Change[int]) -> tuple[str, str, str, str]:
    return (name, count(counts.before), count(counts.after), change(counts.ratio))


def _file_row(bytes_: Change[int] | None) -> tuple[str, str, str, str]:
    if bytes_ is None:
        return ("ONNX file", *(NOT_MEASURED,) * 3)
    return ("ONNX file", size(bytes_.before), size(bytes_.after), change(bytes_.ratio))


def _latency_row(name: str, latency: LatencyChange | None) -> tuple[str, str, str, str]:
    if latency is None:
        return (name, *(NOT_MEASURED,) * 3)
    low, high = map(times, latency.quartiles)
    ratio = f"{change(latency.ratio)}, quartiles {low}-{high}"
    return (name, duration(latency.before), duration(latency.after), ratio)


def fidelity_table(report: Report) -> Table:
    """One row for every output that was compared; unexplained variance, cosine and equal entries are columns where an output has
    them."""
    rows = [
        (
            row.name,
            row.taken_for or DOES_NOT_APPLY,
            _relative(row),
            cell(row.unexplained, percent, DOES_NOT_APPLY),
            cell(row.top1_agreement, percent, DOES_NOT_APPLY),
            cell(row.kl, ".2g", DOES_NOT_APPLY),
            cell(row.cosine, cosine, DOES_NOT_APPLY),
            cell(row.equal_share, percent, DOES_NOT_APPLY),
        )
        for row in report.fidelity
    ]
    return _without_empty(FIDELITY_HEADERS, rows)


def output_sentences(report: Report) -> list[str]:
    """What every output was taken for, and why: ``output: taken for logits: its module is called head.fc``."""
    return [taken(row.name, row.taken_for, row.reason, row.weight) for row in report.outputs]


def taken(name: str, kind: str, reason: str, weight: float) -> str:
    """One sentence of :func:`output_sentences`."""
    if kind == "ignore":
        return f"{name}: neither compared nor checked, {reason}"
    return f"{name}: taken for {kind}{'' if weight == 1 else f' (weight {weight:g})'}: {reason}"


def parity_table(report: Report) -> Table:
    """One row for every output of the model, with equal entries as in :func:`fidelity_table`."""
    rows = [
        (
            _where(row),
            f"{row.max_abs_difference:.1e}",
            DOES_NOT_APPLY if row.equal_share is not None else f"{row.relative_error:.1e}",
            cell(row.equal_share, percent, DOES_NOT_APPLY),
            f"{row.tolerance:.0e}",
            "passed" if row.passed else "FAILED",
        )
        for row in report.parity
    ]
    return _without_empty(PARITY_HEADERS, rows)


def export_rows(report: Report) -> list[tuple[str, ...]]:
    """One row for every form that the result was written in besides ONNX."""
    return [
        (
            row.name,
            ", ".join(row.files) or "none",
            size(row.bytes) if row.files else DOES_NOT_APPLY,
            cell(row.relative_error, ".1e", DOES_NOT_APPLY),
            cell(row.tolerance, ".0e", DOES_NOT_APPLY),
            cell(row.output_error, percent, DOES_NOT_APPLY),
            cell(row.top1_agreement, percent, DOES_NOT_APPLY),
            "FAILED" if row.refused else "passed" if row.passed else "not compared",
        )
        for row in report.exports
    ]


def export_sentences(report: Report) -> list[str]:
    """What wrote each form, on how many examples it was run, and what is wrong with it."""
    return [
        "; ".join(
            (
                f"{row.name}: {row.package}" + (f", run on {counted(row.examples, 'example')}" if row.examples else ""),
                *row.notes,
                *([row.refused] if row.refused else []),
            )
        )
        for row in report.exports
    ]


def _where(row: ParityRow) -> str:
    return row.name if row.runtime == "onnxruntime" else f"{row.name} in {row.runtime}"


def _relative(row: OutputFidelityRow) -> str:
    return DOES_NOT_APPLY if row.equal_share is not None else percent(row.relative_error)


def _without_empty(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The table without those optional columns that are empty for every output."""
    kept = [
        index
        for index, header in enumerate(headers)
        if header not in OPTIONAL or any(row[index] != DOES_NOT_APPLY for row in rows)
    ]
    return Table(tuple(headers[i] for i in kept), [tuple(row[i] for i in kept) for row in rows])


def asked_rows(report: Report) -> list[tuple[str, str, str]]:
    """What was asked for beside what was reached; empty when nothing was asked for."""
    rows = []
    for key, asked in report.asked.budget.items():
        reached = report.reached.budget[key]
        if reached is not None and reached > asked:
            found = f"{beside(asked, reached, '.2f')}x"
        else:
            found = cell(reached, times, NOT_MEASURED)
        rows.append((key, times(asked) if asked == round(asked, 2) else f"{asked:g}x", found))
    if report.asked.keep is not None:
        rows.append(("keep", report.asked.keep, report.reached.keep or NOT_MEASURED))
    return rows


def failures(report: Report) -> list[str]:
    """Why the result is no success, unless its warnings say so already."""
    reasons = (report.refused if report.refused not in report.warnings else None, report.unwritten)
    return [f"No success: {reason}" for reason in reasons if reason]


def headline(report: Report) -> str:
    """What was done and what it saved, in one or two sentences; only measured numbers."""
    rewritten = sum(site.action == "rewritten" for site in report.sites)
    if not rewritten:
        which = f"none of its {len(report.sites)} convolution sites was"
        if len(report.sites) == 1:
            which = "its one convolution site was not"
        return f"{report.model} was left as it is: {which} rewritten."
    totals = report.totals
    saved = f"{times(totals.macs.ratio)} of its MACs and {times(totals.parameters.ratio)} of its parameters"
    latency = totals.onnx_latency_seconds
    name = latency_name(report)
    speed = f"{times(latency.ratio)} of its {name}" if latency else f"its {name} was {NOT_MEASURED}"
    sites = f"{rewritten} of {counted(len(report.sites), 'convolution site')} rewritten"
    if report.useless:
        return f"{report.model} does not compute the same any more. {_fidelity_sentence(report)} {sites}: {saved}; {speed}."
    return f"{report.model}, {sites}: {saved}; {speed}. {_fidelity_sentence(report)}"


def _fidelity_sentence(report: Report) -> str:
    if not report.fidelity:
        return f"Fidelity was {NOT_MEASURED}."
    worst, numbers = Worst.of(report.fidelity), sum(1 for row in report.fidelity if row.equal_share is None)
    of = f" of the worst of {numbers} outputs" if numbers > 1 else ""
    parts = [] if worst.number_error is None else [f"relative output error {percent(worst.number_error)}{of}"]
    parts += [] if worst.agreement is None else [f"top-1 agreement {percent(worst.agreement)}"]
    parts += [] if worst.equal is None else [f"equal entries {percent(worst.equal)}"]
    sentence = f"{', '.join(parts)}, {fidelity_basis(report)}."
    return sentence[0].upper() + sentence[1:]


def fidelity_basis(report: Report) -> str:
    """What fidelity was measured on, with the number of examples."""
    basis, number = str(report.fidelity_basis), counted(report.fidelity_examples, "example")
    return basis if str(report.fidelity_examples) in basis.split() else f"{basis} ({number})"


def calibration_sentence(report: Report) -> str:
    """Which inputs the factors were fitted on."""
    calibration = report.calibration
    if calibration.kind == "weights only":
        return "Not calibrated: the factors are those of the weights alone, without inputs."
    used = f"fitted on {calibration.fitted_on}, {calibration.held_out} held out"
    kind = "synthetic inputs" if calibration.kind == "synthetic" else "inputs"
    return f"Calibrated on {kind} from {calibration.source}: {used}."


def recovered_sentences(report: Report) -> list[str]:
    """What a recovery did, how, and why it ended earlier than asked; none where there was none."""
    found = report.recovered
    if found is None:
        return []
    on = f"on {counted(found.held_out, 'held-out input')}"
    if found.unchanged:
        what = f"Nothing was better than what came in, which is returned unchanged: held-out effect {found.before:.3g} {on}."
    else:
        before, after = apart(found.before, found.after)
        what = f"Held-out effect {before} before, {after} after, {on}; kept from step {found.kept_step}."
    how = ", ".join(
        f"{name} {format(value, 'g') if isinstance(value, float) else value}" for name, value in found.settings.items()
    )
    time = f"{found.minutes:.1f} min" if found.minutes >= 1 else duration(60 * found.minutes)
    run = f"{counted(found.steps, 'step')} in {time} on {counted(found.trained_on, 'input')}: {how}."
    return [what, run, *([f"Ended early: {found.ended}."] if found.ended else [])]


def stages_sentence(report: Report) -> str:
    """Wall time of every stage; empty when none was recorded."""
    return ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds.items())


def environment_sentence(report: Report) -> str:
    """Versions and machine."""
    environment = report.environment
    versions = [f"convrewrite {report.tool_version}", f"Python {environment.python}", f"torch {environment.torch}"]
    for name, version in (("onnx", environment.onnx), ("onnxruntime", environment.onnxruntime)):
        versions += [f"{name} {version}"] if version else []
    machine = f"{environment.platform}, {environment.cpu}, {counted(environment.cores, 'core')}"
    return f"{', '.join(versions)}; {machine}; {counted(report.threads, 'thread')}, seed {report.seed}"


def latency_sentence(report: Report) -> str:
    """How the latencies were measured; empty when none was."""
    if report.totals.onnx_latency_seconds is None and report.totals.torch_latency_seconds is None:
        return ""
    return (
        f"Latencies are of one input with {counted(report.threads, 'thread')}. Their ratio is the median over paired, "
        "interleaved rounds, not the quotient of the two columns before it."
    )


def calls(number: int) -> str:
    """Nothing for one call, otherwise `` (2 calls)``."""
    return "" if number == 1 else f" ({number} calls)"


def joined(names: Sequence[str]) -> str:
    """Names in a row, or ``none``."""
    return ", ".join(names) or "none"
