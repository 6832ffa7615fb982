"""The report: counts that add up, nothing unmeasured shown as measured, and every form of it renders."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import ValidationError

from convrewrite import values
from convrewrite.conv import Kind
from convrewrite.reporting import figures
from convrewrite.reporting.html import render_html
from convrewrite.reporting.markdown import render_markdown
from convrewrite.reporting.page import view_of
from convrewrite.reporting.report import (
    AnalysisRow,
    Asked,
    CalibrationSummary,
    Change,
    Environment,
    LatencyChange,
    OutputFidelityRow,
    ParityRow,
    Reached,
    Report,
    SiteRow,
    Totals,
)
from convrewrite.reporting.text import render_sites, render_text

# Two convolutions of 16 -> 16 channels, 3x3, without bias, on 8x8 outputs, and a linear layer of 16 -> 10 after them.
KERNEL = 16 * 16 * 9
SEPARABLE = 2 * (16 * 9 + 16 * 16)  # rank 2: two pairs of a depthwise and a pointwise convolution
LINEAR = 16 * 10
POSITIONS = 8 * 8


def kept(**changes: Any) -> SiteRow:
    values: dict[str, Any] = {
        "name": "conv1", "kind": "standard", "geometry": "16->16 3x3 p1x1", "action": "kept",
        "reason": "it is the stem",
        "parameters_before": KERNEL, "parameters_after": KERNEL,
        "macs_before": KERNEL * POSITIONS, "macs_after": KERNEL * POSITIONS,
    }  # fmt: skip
    return SiteRow.model_validate(values | changes)


def rewritten(**changes: Any) -> SiteRow:
    values: dict[str, Any] = {
        "name": "conv2", "kind": "standard", "geometry": "16->16 3x3 p1x1", "calls": 2, "action": "rewritten",
        "option": "separable, rank 2, depthwise-first, as branches",
        "parameters_before": KERNEL, "parameters_after": SEPARABLE,
        "macs_before": 2 * KERNEL * POSITIONS, "macs_after": 2 * SEPARABLE * POSITIONS,
        "output_error": 0.0312, "error_basis": "held-out inputs",
    }  # fmt: skip
    return SiteRow.model_validate(values | changes)


def totals(**changes: Any) -> Totals:
    values: dict[str, Any] = {
        "parameters": Change(before=KERNEL + KERNEL + LINEAR, after=KERNEL + SEPARABLE + LINEAR),
        "macs": Change(
            before=KERNEL * POSITIONS + 2 * KERNEL * POSITIONS + LINEAR,
            after=KERNEL * POSITIONS + 2 * SEPARABLE * POSITIONS + LINEAR,
        ),
    }
    return Totals(**(values | changes))


def bare(**changes: Any) -> Report:
    """A report in which nothing optional was measured."""
    values: dict[str, Any] = {
        "tool_version": "0.1.0", "model": "net.pt", "input_shapes": ((1, 16, 8, 8),), "rules": ("separable",),
        "seed": 0, "threads": 1, "calibration": CalibrationSummary(source="net.pt", kind="weights only"),
        "sites": (kept(), rewritten(output_error=None, error_basis=None)), "totals": totals(),
        "environment": Environment(python="3.11", torch="2.13", platform="Linux", cpu="a processor", cores=2),
    }  # fmt: skip
    return Report(**(values | changes))


def full() -> Report:
    """A report in which everything was measured."""
    latency = LatencyChange(before=3.9e-3, after=1.6e-3, ratio=0.4, quartiles=(0.39, 0.41))
    return bare(
        sites=(kept(), rewritten()),
        asked=Asked(budget={"macs": 0.5}, keep="top-1 agreement of at least 0.98"),
        reached=Reached(budget={"macs": 0.56}, keep="top-1 agreement 0.985"),
        calibration=CalibrationSummary(source="images/", kind="data", fitted_on=820, held_out=205),
        totals=totals(
            file_bytes=Change(before=19_500, after=11_200),
            onnx_latency_seconds=latency,
            torch_latency_seconds=latency,
            predicted_onnx_latency_seconds=1.7e-3,
        ),
        fidelity=(
            OutputFidelityRow(name="logits", relative_error=0.032, top1_agreement=0.985, kl=0.0123, taken_for="logits"),
        ),
        fidelity_examples=205,
        fidelity_basis="measured on 205 held-out calibration inputs",
        parity=(
            ParityRow(name="logits", max_abs_difference=2e-6, relative_error=3e-7, tolerance=1e-4, passed=True),
            ParityRow(name="features", max_abs_difference=2e-1, relative_error=3e-2, tolerance=1e-4, passed=False),
        ),
        notes=("conv1 is the stem",),
        seconds={"trace": 0.25, "fit": 12.0},
    )


def line(text: str, start: str) -> str:
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return found


def test_totals_are_the_visible_products() -> None:
    text = render_text(full())
    assert KERNEL + KERNEL + LINEAR == 4768
    assert KERNEL + SEPARABLE + LINEAR == 3264
    assert line(text, "parameters ").split() == ["parameters", "4.77", "k", "3.26", "k", "0.68x", "(-32", "%)"]
    assert (2304 + 2 * 2304) * 64 + 160 == 442_528
    assert (2304 + 2 * 800) * 64 + 160 == 250_016
    assert line(text, "MACs of one").split()[4:] == ["443", "k", "250", "k", "0.56x", "(-44", "%)"]


def test_rows_show_ratios_of_the_visible_products() -> None:
    row = line(render_text(full()), "conv2 ")
    assert " ".join(row.split()).endswith("295 k 0.35x 0.35x 3.1 % rank 2 [2]")
    assert round(SEPARABLE / KERNEL, 2) == 0.35
    assert "295 k" in row
    assert round(2 * KERNEL * POSITIONS / 1000) == 295


@pytest.mark.parametrize("what", ["parameters", "macs"])
@pytest.mark.parametrize("error", [-1, 1, KERNEL])
def test_wrong_sums_are_rejected(what: str, error: int) -> None:
    right: Change[int] = getattr(totals(), what)
    wrong = Change(before=right.before, after=right.after + error)
    with pytest.raises(ValidationError, match=rf"totals\.{what}: expected a difference of"):
        bare(totals=totals(**{what: wrong}))


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (kept, {"reason": None}, "expected a reason"),
        (kept, {"reason": ""}, "expected a reason"),
        (kept, {"option": "cp rank=4"}, "no option for a kept site"),
        (kept, {"macs_after": KERNEL}, "expected a kept site to cost what it did"),
        (rewritten, {"option": None}, "expected the option"),
        (rewritten, {"error_basis": None}, "output_error and error_basis together"),
        (rewritten, {"output_error": None}, "output_error and error_basis together"),
        (rewritten, {"rank": 2}, "Extra inputs are not permitted"),
    ],
)
def test_a_row_that_does_not_say_what_and_why_is_rejected(build: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**changes)


def test_what_was_asked_has_to_be_answered_and_fidelity_has_to_name_its_basis() -> None:
    with pytest.raises(ValidationError, match=r"expected the keys of asked\.budget \(macs\), found none"):
        bare(asked=Asked(budget={"macs": 0.5}))
    with pytest.raises(ValidationError, match="fidelity_basis"):
        bare(fidelity=(OutputFidelityRow(name="logits", relative_error=0.1),))


def test_a_latency_ratio_lies_between_its_quartiles() -> None:
    with pytest.raises(ValidationError, match="between its quartiles"):
        LatencyChange(before=2.0, after=1.0, ratio=0.5, quartiles=(0.6, 0.7))


@pytest.mark.parametrize("report", [bare(), full()], ids=["bare", "full"])
def test_json_round_trip(report: Report) -> None:
    again = Report.model_validate_json(report.model_dump_json())
    assert again == report
    assert render_text(again) == render_text(report)


def test_json_keeps_a_number_that_is_not_finite() -> None:
    row = OutputFidelityRow(name="logits", relative_error=float("inf"))
    assert OutputFidelityRow.model_validate_json(row.model_dump_json()) == row


def test_json_of_another_schema_is_rejected() -> None:
    text = bare().model_dump_json().replace('"schema_version":1', '"schema_version":2')
    with pytest.raises(ValidationError, match="schema_version"):
        Report.model_validate_json(text)


@pytest.mark.parametrize("render", [render_text, render_markdown])
def test_what_was_not_measured_is_never_shown_as_measured(render: Any) -> None:
    text = render(bare(totals=totals(predicted_onnx_latency_seconds=1.7e-3)))
    assert "its ONNX latency was not measured. Fidelity was not measured." in " ".join(text.split())
    rows = {row.strip("| ").split("  ")[0].split(" |")[0]: row for row in text.splitlines()}
    for name in ("ONNX latency", "torch latency", "ONNX file"):
        assert rows[name].count("not measured") == 3
        assert "x" not in rows[name].replace("ONNX", "")
    assert "1.70 ms" in rows["latency elsewhere, predicted"]
    assert "a prediction" in rows["latency elsewhere, predicted"]
    assert text.count("1.70 ms") == 1
    assert "weights alone" in text


def test_the_text_names_everything_that_was_measured() -> None:
    text = render_text(full())
    assert "1 of 2 convolution sites rewritten: 0.56x of its MACs and 0.68x of its\nparameters" in text
    assert line(text, "conv1 ").endswith("kept [1]") and line(text, "[1]") == "[1] it is the stem"
    assert line(text, "[2]") == "[2] separable, depthwise-first, as branches"
    assert "0.40x (-60 %), quartiles 0.39x-0.41x" in line(text, "ONNX latency  ")
    fidelity, parity = [row.split() for row in text.splitlines() if row.startswith("logits ")]
    assert fidelity == ["logits", "logits", "3.2", "%", "98.5", "%", "0.012"]
    assert parity == ["logits", "2.0e-06", "3.0e-07", "1e-04", "passed"]
    assert line(text, "features").endswith("FAILED")
    assert line(text, "macs").split() == ["macs", "0.50x", "0.56x"]
    assert "output error: relative, on held-out inputs" in text
    assert "Calibrated on inputs from images/: fitted on 820, 205 held out." in text


def test_the_page_has_all_its_sections() -> None:
    page = render_markdown(full())
    titles = [row.removeprefix("## ") for row in page.splitlines() if row.startswith("## ")]
    assert titles == [
        "What was saved", "Asked and reached", "Fidelity: rewritten against original",
        "Parity: onnxruntime against torch", "Sites", "Calibration", "Notes", "Environment",
    ]  # fmt: skip
    assert page.startswith("# net.pt: convolutions rewritten\n")


def test_names_cannot_break_a_markdown_table() -> None:
    page = render_markdown(bare(sites=(kept(name="a|b\n*c*"), rewritten())))
    row = line(page, "| a")
    assert row.startswith("| a\\|b \\*c\\* ")
    assert row.count("|") - row.count("\\|") == 13


def test_error_marks_say_what_an_error_was_measured_on() -> None:
    sites = (kept(), rewritten(error_basis="weights"))
    text = render_text(bare(sites=sites))
    assert "3.1 %  rank 2" in line(text, "conv2 ")
    assert "output error: relative, of the weights alone, without inputs" in text
    assert "on held-out inputs" not in text
    third = rewritten(name="conv3", parameters_after=KERNEL, macs_after=2 * KERNEL * POSITIONS)
    mixed = render_text(bare(sites=(*sites, third)))
    assert "3.1 % w  rank 2" in line(mixed, "conv2 ") and "3.1 %  rank 2" in line(mixed, "conv3 ")
    assert "output error: relative, on held-out inputs; w: of the weights alone, without inputs" in " ".join(
        mixed.split()
    )


def test_a_model_without_a_rewrite_is_said_to_be_as_it_was() -> None:
    cost = Change(before=10, after=10)
    report = bare(sites=(), totals=Totals(parameters=cost, macs=cost))
    assert render_text(report).startswith("net.pt was left as it is: none of its 0 convolution sites was rewritten.")
    assert "No convolutions were found." in render_markdown(report)


def test_analysis_numbers_its_reasons_once() -> None:
    stem = AnalysisRow(
        name="conv1", kind="standard", geometry="16->16 3x3 p1x1", parameters=KERNEL, macs=KERNEL * POSITIONS,
        mac_share=0.25, applies={"separable": "it is the stem", "cp": "it is the stem"},
    )  # fmt: skip
    rows = [stem, stem.model_copy(update={"name": "conv2", "calls": 3, "applies": {"separable": "yes", "cp": "no cp"}})]
    text, wide = render_sites(rows), render_sites(rows, 100)
    assert line(text, "conv1").endswith("none [1]") and line(text, "[1]") == "[1] not separable, cp: it is the stem"
    assert line(text, "conv2").endswith("1 of 2 [2]") and line(text, "[2]") == "[2] not cp: no cp"
    assert line(wide, "conv1").endswith("no: all [1]") and line(wide, "[1]") == "[1] it is the stem"
    assert line(wide, "conv2").endswith("yes: separable; no: cp [2]") and line(wide, "[2]") == "[2] no cp"
    assert line(text, "conv1").split()[5:12] == ["1", "2.30", "k", "147", "k", "25.0", "%"]
    assert "calls" in text and "calls" not in render_sites([stem])
    one = render_sites([row.model_copy(update={"applies": {"cp": row.applies["cp"]}}) for row in rows])
    assert line(one, "site").endswith("  cp") and line(one, "conv1").endswith("%  no [1]")
    assert render_sites([]) == "No convolutions were found.\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (45_600, "45.6 k"), (999_499, "999 k"), (999_999, "1.00 M"),
     (1_234_567, "1.23 M"), (11_700_000_000, "11.7 G"), (2 * 10**12, "2.00 T")],
)  # fmt: skip
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert figures.count(number) == text


def test_other_numbers_have_their_unit() -> None:
    assert [figures.duration(s) for s in (4.5e-5, 3.9e-3, 1.2, 75)] == ["45.0 us", "3.90 ms", "1.20 s", "75.0 s"]
    assert [figures.percent(p) for p in (0.98, 0.0321, 0.00012, 12.3)] == ["98.0 %", "3.2 %", "0.012 %", "1230 %"]
    assert [figures.percent(p) for p in (0.99949, 0.9996, 1.0)] == ["99.9 %", "99.9 %", "100.0 %"]
    assert [values.share(p) for p in (0.98254, 0.999999, 1.0)] == ["98.25%", "99.99%", "100.00%"]
    assert [figures.change(r) for r in (0.998, 1.0, 1.002, 0.38)] == [
        "1.00x (+0 %)", "1.00x (+0 %)", "1.00x (+0 %)", "0.38x (-62 %)",
    ]  # fmt: skip
    assert [figures.change(r) for r in (0.004, 0.00004, 0)] == [
        "0.004x (-99.6 %)",
        "4e-05x (-99.996 %)",
        "0.00x (-100 %)",
    ]
    assert [values.cosine(c) for c in (0.98256, 0.99997, 1.0)] == ["0.9826", "0.99997", "1.0000"]
    assert [figures.size(n) for n in (950, 4_560_000)] == ["950 B", "4.56 MB"]
    assert figures.change(0.381) == "0.38x (-62 %)"


def test_a_change_from_nothing_has_a_ratio() -> None:
    assert Change(before=0, after=0).ratio == 1.0
    assert Change(before=0, after=3).ratio == float("inf")
    assert Change(before=4, after=1).ratio == 0.25


NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=60)
COSTS = st.tuples(st.integers(0, 10**12), st.integers(0, 10**12))


@st.composite
def reports(draw: st.DrawFn) -> Report:
    """Reports of any size, without anything optional."""
    sites = []
    for parameters, macs in draw(st.lists(st.tuples(COSTS, COSTS), max_size=4)):
        basis = draw(st.sampled_from(["held-out inputs", "fitted inputs", "synthetic inputs", "weights", None]))
        costs = {
            "parameters_before": parameters[0], "parameters_after": parameters[1],
            "macs_before": macs[0], "macs_after": macs[1],
        }  # fmt: skip
        error = draw(st.floats(0, 1e3)) if basis else None
        words = {key: draw(NAMES) for key in ("name", "option", "geometry")}
        calls = draw(st.integers(1, 99))
        sites.append(rewritten(**words, **costs, kind="asymmetric", calls=calls, output_error=error, error_basis=basis))
    sums = [sum(getattr(site, f"{what}_{when}") for site in sites)
            for what in ("parameters", "macs") for when in ("before", "after")]  # fmt: skip
    counts = Totals(parameters=Change(before=sums[0], after=sums[1]), macs=Change(before=sums[2], after=sums[3]))
    return bare(model=draw(NAMES), rules=tuple(draw(st.lists(NAMES, max_size=3))), sites=tuple(sites), totals=counts)


@given(reports())
@settings(max_examples=60)
def test_every_report_renders_within_its_width(report: Report) -> None:
    text = render_text(report)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("not measured") >= 11
    assert render_markdown(report).count("## ") == 6
    assert Report.model_validate_json(report.model_dump_json()) == report


@given(reports())
@settings(max_examples=4)
def test_every_report_renders_as_html(report: Report) -> None:
    page = render_html(report)
    drawn = any(site.output_error is not None for site in report.sites)
    some = (bool(report.sites), drawn, bool(view_of(report, None).promises), report.recovered is not None)
    assert page.count("<h2 ") == 4 + sum(some)
    assert page.count("<svg") == drawn
    assert page.count('<article class="site"') == len(report.sites)
    assert page.endswith("</html>\n")


def test_the_html_page_escapes_names_and_needs_nothing_from_outside() -> None:
    sites = (kept(name="<script>alert(1)</script>"), rewritten(name="cost$in$dollars$"))
    page = render_html(full().model_copy(update={"sites": sites}))
    assert page.count("<script") == 1, "its own"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "cost$in$dollars$" in page
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))
    assert page == render_html(full().model_copy(update={"sites": sites}))


def test_the_widest_tables_keep_to_the_width() -> None:
    words = " ".join(["abcdefghij" * 4] * 6)
    wide = {"name": words, "kind": "asymmetric", "geometry": words, "option": words}
    numbers = {"parameters_before": 333_000, "macs_before": 333_000, "output_error": 0.00012, "error_basis": "weights"}
    site = rewritten(**wide, **numbers)
    cost = Change(before=333_000, after=SEPARABLE), Change(before=333_000, after=2 * SEPARABLE * POSITIONS)
    output = OutputFidelityRow(name=words, relative_error=0.000123, top1_agreement=0.000123, kl=0.000123)
    parity = ParityRow(name=words, max_abs_difference=1e-6, relative_error=1e-6, tolerance=1e-4, passed=False)
    report = bare(
        sites=(site,), totals=Totals(parameters=cost[0], macs=cost[1]), fidelity=(output,), fidelity_basis=words,
        parity=(parity,), notes=(words,), asked=Asked(keep=words), reached=Reached(keep=words),
    )  # fmt: skip
    analysis = AnalysisRow(
        name=words, kind="asymmetric", geometry=words, parameters=333_000, macs=333_000, mac_share=0.000123,
        applies={words: "yes", "other": words},
    )  # fmt: skip
    for text in (render_text(report), render_sites([analysis])):
        assert 75 <= max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("kind", list(Kind))
def test_the_name_of_a_kind_is_never_broken(kind: Kind) -> None:
    assert f" {kind} " in render_text(bare(sites=(kept(kind=kind), rewritten())), width=90)


def test_the_basis_of_fidelity_counts_its_examples_once() -> None:
    output = OutputFidelityRow(name="logits", relative_error=0.1)
    report = bare(fidelity=(output,), fidelity_examples=8, fidelity_basis="measured on random noise inputs")
    assert figures.fidelity_basis(report) == "measured on random noise inputs (8 examples)"
    assert figures.fidelity_basis(full()) == "measured on 205 held-out calibration inputs"


@pytest.mark.parametrize(
    "name", ["# big", "> quoted", "- one", "+ one", "1. one", "23) one", "=== x", "~~gone~~", "&copy; x"]
)
def test_names_make_nothing_of_a_page_in_markdown(name: str) -> None:
    shown = markdown_to_text(render_markdown(bare(model=name, notes=(f"{name}: a note",))))
    assert shown.count(name) == 3 and "\\" not in shown


def markdown_to_text(text: str) -> str:
    """What is shown of it: the text without what makes headings, lists and the like."""
    tokens = MarkdownIt("commonmark").enable("strikethrough").parse(text)
    return " ".join("".join(part.content for part in token.children) for token in tokens if token.children)
