"""Results side by side: what is to be known before their numbers are laid beside each other."""

from convrewrite.reporting import Compared, Report
from convrewrite.reporting.report import (
    CalibrationSummary,
    Change,
    Environment,
    LatencyChange,
    OutputFidelityRow,
    SiteRow,
    Totals,
)

NOISE = "measured on 64 random noise inputs"
WARNING = "the result does not compute the same any more: <75 %>"


def result(basis: str, **changed: object) -> Report:
    site = SiteRow(
        name="conv", kind="standard", geometry="3->8 3x3 p1", action="kept", reason="it is the stem", parameters_before=9,
        parameters_after=9, macs_before=90, macs_after=90,
    )  # fmt: skip
    known = {
        "tool_version": "1", "model": "net.pt", "input_shapes": (), "rules": (), "seed": 0, "threads": 1, "sites": (site,),
        "calibration": CalibrationSummary(source="images", kind="data"), "fidelity_basis": basis,
        "totals": Totals(parameters=Change[int](before=9, after=9), macs=Change[int](before=90, after=90)),
        "fidelity": (OutputFidelityRow(name="output", relative_error=0.75),),
        "environment": Environment(python="3", torch="2", platform="Linux", cpu="one", cores=1),
    }  # fmt: skip
    return Report.model_validate(known | changed)


def test_one_of_no_use_is_told_though_it_was_not_refused() -> None:
    useless = result(NOISE, useless=True, warnings=(WARNING,))
    compared = Compared.of([("a", useless), ("b", result(NOISE))])
    assert "useless" in compared.text() and f"a: {WARNING}" in compared.text()
    assert "does not compute the same any more: &lt;75 %&gt;" in compared.page() and "<75" not in compared.page()


def test_a_page_has_the_reasons_that_the_terminal_has() -> None:
    compared = Compared.of([("a", result(NOISE, refused="it is slower")), ("b", result(NOISE))])
    assert "a: it is slower" in compared.text() and "<p>a: it is slower</p>" in compared.page()
    assert NOISE not in compared.page()
    assert "Content-Security-Policy" in compared.page()


def test_fidelity_that_was_measured_on_other_inputs_is_told_to_be() -> None:
    compared = Compared.of([("a", result(NOISE)), ("b", result("measured on 13 held-out calibration inputs"))])
    for line in (f"a: {NOISE}", "b: measured on 13 held-out calibration inputs"):
        assert line in compared.text() and line in compared.page()
    earlier = Compared.of([("a", result(NOISE)), ("b", result(NOISE, fidelity=(), fidelity_basis=None))])
    assert len(earlier.text().splitlines()) == 4, "where nothing was measured there is nothing to tell"


def test_every_number_is_in_its_column() -> None:
    latency = LatencyChange(before=2.0, after=1.0, ratio=0.5, quartiles=(0.4, 0.6))
    same = Change[int](before=90, after=90)
    timed = Totals(parameters=same, macs=same, onnx_latency_seconds=latency)
    outputs = (
        OutputFidelityRow(name="scores", relative_error=0.25, top1_agreement=0.9, kl=0.0123),
        OutputFidelityRow(name="more", relative_error=0.125, top1_agreement=0.8, kl=0.002),
    )
    named = [
        ("a", result(NOISE, totals=timed, fidelity=outputs)),
        ("b", result(NOISE, useless=True, warnings=(WARNING,))),
        ("c", result(NOISE, useless=True, warnings=(WARNING,), refused="it is slower")),
    ]
    rows = [line.split("  ") for line in Compared.of(named).text().splitlines()]
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert ["a", "net.pt", "1.00x", "1.00x", "0.50x", "80.0 %", "0.0123", "25.0 %"] in cells
    assert ["b", "net.pt", "1.00x", "1.00x", "75.0 %", "useless"] in cells
    assert ["c", "net.pt", "1.00x", "1.00x", "75.0 %", "refused"] in cells
    assert [row[0] for row in cells if row[0][1:2] == ":"] == [f"b: {WARNING}", "c: it is slower"]
    assert {r.name: r.latency for r in Compared.of(named).results} == {"a": 0.5, "b": None, "c": None}
