"""Rows and sentences of the report, word for word, where the forms of it hold only parts of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_reporting import bare, full, kept, rewritten, totals

from convrewrite.exports import Written
from convrewrite.meanings.fidelity import Fidelity, OutputFidelity
from convrewrite.reporting import figures
from convrewrite.reporting.html import render_html, render_summary
from convrewrite.reporting.markdown import render_markdown
from convrewrite.reporting.report import (
    Asked,
    CalibrationSummary,
    Change,
    ExportRow,
    LatencyChange,
    OutputFidelityRow,
    OutputRow,
    ParityRow,
    Reached,
    RecoveredSummary,
    Report,
    Totals,
)
from convrewrite.reporting.text import render_text
from convrewrite.values import some_of

LATENCY = LatencyChange(before=2.0, after=1.0, ratio=0.5, quartiles=(0.4, 0.6))
OF_NUMBERS = OutputFidelityRow(name="boxes", relative_error=0.021)
OF_CLASSES = OutputFidelityRow(name="logits", relative_error=0.031, top1_agreement=0.985, kl=0.01)
OF_WHOLE_NUMBERS = OutputFidelityRow(name="mask", relative_error=0.5, equal_share=0.5)


def test_a_site_in_full() -> None:
    row = rewritten(macs_before=1000, macs_after=250, positions=300, unknowns=144)
    assert figures.site_cells(row) == (
        "conv2", "standard", "16->16 3x3 p1x1 (2 calls)", "separable, rank 2, depthwise-first, as branches", "2.30 k", "800",
        "1.00 k", "250", "0.25x", "3.1 %", "held-out inputs", "2.08",
    )  # fmt: skip
    unmeasured = rewritten(macs_before=0, macs_after=0, output_error=None, error_basis=None)
    assert figures.site_cells(unmeasured)[8:] == ("", "not measured", "", ""), "without MACs there is no part of them"
    assert figures.site_cells(kept())[8:] == ("", "", "", ""), "of a site that was kept nothing is missing"


@pytest.mark.parametrize("render", [render_text, render_markdown, render_html, render_summary])
def test_every_form_says_once_that_a_result_is_no_success(render: Callable[[Report], str]) -> None:
    form = ExportRow(name="executorch", package="executorch 1.0", files=(), bytes=0, refused="it cannot be written")

    def told(report: Report) -> str:
        return " ".join(render(report).split())

    late = told(bare(refused="asked for macs=0.3, reached 0.498", exports=(form,)))
    assert late.count("No success: asked for macs=0.3, reached 0.498") == 1
    assert late.count("No success: export executorch: it cannot be written") == 1
    useless = told(bare(refused="it computes something else", useless=True, warnings=("it computes something else",)))
    assert useless.count("it computes something else") == 1
    assert "No success" not in told(full())


def test_a_part_that_misses_what_was_asked_is_told_from_it() -> None:
    def told(reached: float) -> str:
        asked, found = Asked(budget={"macs": 0.25}), Reached(budget={"macs": reached})
        return figures.asked_rows(bare(asked=asked, reached=found))[0][2]

    assert [told(part) for part in (0.2497, 0.25, 0.2504, 0.31)] == ["0.25x", "0.25x", "0.2504x", "0.31x"]
    exact = bare(
        asked=Asked(budget={"macs": 0.125, "params": 0.5}), reached=Reached(budget={"macs": 0.1, "params": 0.4})
    )
    assert [row[1] for row in figures.asked_rows(exact)] == ["0.125x", "0.50x"]


def test_positions_per_unknown_are_no_powers_of_ten() -> None:
    asked = ((9, 18), (300, 27), (1_048_576, 27), (9999, 10))
    cells = [figures.site_cells(rewritten(positions=one, unknowns=other))[-1] for one, other in asked]
    assert cells == ["0.5", "11.1", "38.8 k", "1.00 k"]


def test_of_one_there_is_no_plural() -> None:
    cost = Change(before=10, after=10)
    alone = bare(sites=(kept(parameters_before=5, parameters_after=5),), totals=Totals(parameters=cost, macs=cost))
    assert figures.headline(alone) == "net.pt was left as it is: its one convolution site was not rewritten."
    assert "<summary>1 site</summary>" in render_summary(alone) and "1 of 1 site<" in render_html(alone)
    assert (
        some_of(["a", "b"], 1, "site") == "a and 1 more site" and some_of(["a"] * 3, 1, "site") == "a and 2 more sites"
    )


def test_parts_of_little_and_of_nothing() -> None:
    assert [figures.times(ratio) for ratio in (0.0, 0.0004, 0.0014, 0.0949, 0.095, 1.0)] == [
        "0.00x", "0.0004x", "0.001x", "0.095x", "0.10x", "1.00x",
    ]  # fmt: skip


def test_a_latency_has_the_name_of_what_it_was_measured_in() -> None:
    there = bare(runtime="openvino", totals=totals(onnx_latency_seconds=LATENCY, predicted_onnx_latency_seconds=1.1))
    rows = {row[0]: row[1:] for row in figures.totals_rows(there)}
    assert rows["latency in openvino"] == ("2.00 s", "1.00 s", "0.50x (-50 %), quartiles 0.40x-0.60x")
    assert rows["latency in openvino, predicted"] == ("", "1.10 s", "a prediction")
    assert "0.50x of its latency in openvino." in figures.headline(there)
    elsewhere = totals(predicted_onnx_latency_seconds=1.1, predicted_in="tensorrt")
    assert [row[0] for row in figures.totals_rows(bare(totals=elsewhere))][4] == (
        "latency elsewhere in tensorrt, predicted"
    )


def test_how_latencies_were_measured_is_told_where_any_was() -> None:
    said = "Latencies are of one input with 1 thread. Their ratio is the median over paired, interleaved rounds, "
    for measured in ({"onnx_latency_seconds": LATENCY}, {"torch_latency_seconds": LATENCY}):
        assert figures.latency_sentence(bare(totals=totals(**measured))).startswith(said)
    assert figures.latency_sentence(bare(totals=totals(predicted_onnx_latency_seconds=1.1))) == ""


def test_the_headline_tells_the_worst_of_several_outputs() -> None:
    def told(*rows: OutputFidelityRow) -> str:
        found = bare(fidelity=rows, fidelity_examples=20, fidelity_basis="measured on 20 inputs")
        return figures.headline(found).partition("not measured. ")[2]

    assert told(OF_NUMBERS) == "Relative output error 2.1 %, measured on 20 inputs."
    assert told(OF_CLASSES, OF_NUMBERS) == (
        "Relative output error 3.1 % of the worst of 2 outputs, top-1 agreement 98.5 %, measured on 20 inputs."
    )
    assert told(OF_WHOLE_NUMBERS) == "Equal entries 50.0 %, measured on 20 inputs."
    assert told(OF_NUMBERS, OF_WHOLE_NUMBERS) == (
        "Relative output error 2.1 %, equal entries 50.0 %, measured on 20 inputs."
    )


def test_of_whole_numbers_the_equal_entries_count() -> None:
    rows = (OF_CLASSES, OF_WHOLE_NUMBERS)
    table = figures.fidelity_table(bare(fidelity=rows, fidelity_examples=2, fidelity_basis="measured"))
    assert table.headers == (
        "output", "taken for", "relative error", "top-1 agreement", "KL (nats)", "equal entries",
    )  # fmt: skip
    assert table.rows == [("logits", "-", "3.1 %", "98.5 %", "0.01", "-"), ("mask", "-", "-", "-", "-", "50.0 %")]
    held = ParityRow(
        name="mask", max_abs_difference=1.0, relative_error=0.5, tolerance=1e-3, passed=False, equal_share=0.5,
        runtime="openvino",
    )  # fmt: skip
    parity = figures.parity_table(bare(parity=(held,)))
    assert parity.rows == [("mask in openvino", "1.0e+00", "-", "50.0 %", "1e-03", "FAILED")]
    assert figures.parity_title(bare(parity=(held,))) == "Parity: onnxruntime and openvino against torch"


def test_what_outputs_were_taken_for() -> None:
    rows = (
        OutputRow(name="a", taken_for="logits", reason="it is said so"),
        OutputRow(name="b", taken_for="values", reason="it is said so", weight=0.5),
        OutputRow(name="c", taken_for="ignore", reason="as was asked"),
    )
    assert figures.output_sentences(bare(outputs=rows)) == [
        "a: taken for logits: it is said so",
        "b: taken for values (weight 0.5): it is said so",
        "c: neither compared nor checked, as was asked",
    ]


def test_a_form_says_how_near_it_is_or_why_it_is_not_there() -> None:
    there = ExportRow(
        name="half", package="onnxruntime 1", files=("a.onnx", "b"), bytes=2000, relative_error=1e-4, tolerance=2e-2,
        passed=True, output_error=0.031, top1_agreement=0.99, examples=1, notes=("5 nodes stay",),
    )  # fmt: skip
    unrun, gone = (
        ExportRow(name="core_ml", package="coremltools 8", files=("m",), bytes=10),
        ExportRow(name="openvino", package="openvino 2025", passed=False, refused="cannot be written: no room"),
    )
    report = bare(exports=(there, unrun, gone))
    assert figures.export_rows(report) == [
        ("half", "a.onnx, b", "2.00 kB", "1.0e-04", "2e-02", "3.1 %", "99.0 %", "passed"),
        ("core_ml", "m", "10 B", "-", "-", "-", "-", "not compared"),
        ("openvino", "none", "-", "-", "-", "-", "-", "FAILED"),
    ]
    assert figures.export_sentences(report) == [
        "half: onnxruntime 1, run on 1 example; 5 nodes stay",
        "core_ml: coremltools 8",
        "openvino: openvino 2025; cannot be written: no room",
    ]
    assert report.unwritten == "export openvino: cannot be written: no room"


def test_synthetic_inputs_are_called_so_and_a_recovery_says_why_it_ended() -> None:
    calibration = CalibrationSummary(source="BatchNorm", kind="synthetic", fitted_on=200, held_out=50)
    assert figures.calibration_sentence(bare(calibration=calibration)) == (
        "Calibrated on synthetic inputs from BatchNorm: fitted on 200, 50 held out."
    )
    found = RecoveredSummary(
        before=0.5, after=0.25, steps=100, kept_step=80, minutes=1.5, trained_on=800, held_out=1,
        settings={"rate": 0.01, "precision": "float32"}, ended="nothing was gained",
    )  # fmt: skip
    assert figures.recovered_sentences(bare(recovered=found)) == [
        "Held-out effect 0.5 before, 0.25 after, on 1 held-out input; kept from step 80.",
        "100 steps in 1.5 min on 800 inputs: rate 0.01, precision float32.",
        "Ended early: nothing was gained.",
    ]
    little = found.model_copy(update={"before": 0.00053541, "after": 0.00053511})
    assert figures.recovered_sentences(bare(recovered=little))[0].startswith(
        "Held-out effect 0.0005354 before, 0.0005351 after,"
    )
    short = found.model_copy(update={"minutes": 0.0405})
    assert figures.recovered_sentences(bare(recovered=short))[1].startswith("100 steps in 2.43 s on 800 inputs: ")
    unchanged = found.model_copy(update={"after": 0.5, "kept_step": 0, "ended": None})
    assert [line.partition(":")[0] for line in figures.recovered_sentences(bare(recovered=unchanged))] == [
        "Nothing was better than what came in, which is returned unchanged",
        "100 steps in 1.5 min on 800 inputs",
    ]


def test_only_packages_that_are_there_have_versions() -> None:
    said = figures.environment_sentence(full())
    assert said == ("convrewrite 0.1.0, Python 3.11, torch 2.13; Linux, a processor, 2 cores; 1 thread, seed 0")


def test_a_form_that_was_written_is_told_by_its_worst_output_and_one_that_was_refused_first() -> None:
    near = Fidelity((OutputFidelity("scores", 0.1, 0.95, 0.01), OutputFidelity("more", 0.2, 0.99, 0.02)), 20)
    made = Written("half", "onnxruntime 1", (Path("a/half.onnx"),), 7, (0.5, 0.25, 0.3), near, 20, ("a note",))
    row = ExportRow.of(made)
    assert (row.max_abs_difference, row.relative_error, row.tolerance, row.passed) == (0.5, 0.25, 0.3, True)
    assert (row.output_error, row.top1_agreement, row.kl) == (0.2, 0.95, 0.02)
    assert (row.files, row.bytes, row.examples, row.notes) == (("half.onnx",), 7, 20, ("a note",))
    unrun = ExportRow.of(Written("core_ml", "coremltools 8", (Path("m"),), 10))
    assert (unrun.passed, unrun.relative_error, unrun.output_error, unrun.top1_agreement, unrun.kl) == (None,) * 5
    gone = Written("half", "onnxruntime 1", refused="it overflows")
    assert ExportRow.of(gone).passed is False
    report = bare().with_exports([made, Written("core_ml", "coremltools 8", (Path("m"),), 10)])
    assert report.unwritten is None
    again = report.with_exports([gone])
    assert [(export.name, export.passed) for export in again.exports] == [("half", False), ("core_ml", None)]
    assert again.unwritten == "export half: it overflows"
