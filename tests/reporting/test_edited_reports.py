"""Reports that someone changed by hand, and names that no text can hold."""

import json
import os

import pytest
from pydantic import ValidationError

from convrewrite.reporting import Report, render_html, render_markdown, render_text
from convrewrite.reporting.report import LARGEST, CalibrationSummary, Change, Environment, SiteRow, Totals

BEYOND = 10**400
"""A number of which no float can be made."""


def small(**changed: object) -> Report:
    site = SiteRow(
        name="conv", kind="standard", geometry="3->8 3x3 p1", action="rewritten", option="separable, rank 1",
        parameters_before=90, parameters_after=50, macs_before=900, macs_after=500, positions=64, unknowns=9,
    )  # fmt: skip
    known = {
        "tool_version": "1", "model": "net.pt", "input_shapes": ((1, 3, 8, 8),), "rules": ("separable",), "seed": 0, "threads": 1,
        "calibration": CalibrationSummary(source="images", kind="data"), "sites": (site,),
        "totals": Totals(parameters=Change[int](before=100, after=60), macs=Change[int](before=1000, after=600)),
        "environment": Environment(python="3", torch="2", platform="Linux", cpu="one", cores=1),
    }  # fmt: skip
    return Report.model_validate(known | changed)


@pytest.mark.parametrize("value", [BEYOND, LARGEST + 1, -1])
@pytest.mark.parametrize(
    "way",
    [
        ("totals", "file_bytes", "before"), ("totals", "macs", "after"), ("sites", 0, "positions"), ("sites", 0, "macs_before"),
        ("calibration", "held_out"), ("recovered", "curve", 0, 0), ("seed",), ("input_shapes", 0, 1),
    ],
)  # fmt: skip
def test_a_count_that_none_can_be_is_refused(way: tuple[str | int, ...], value: int) -> None:
    recovered = {
        "before": 1.0,
        "after": 0.5,
        "steps": 2,
        "kept_step": 2,
        "minutes": 1.0,
        "trained_on": 9,
        "held_out": 9,
    }
    entries = json.loads(small().model_dump_json())
    entries["totals"]["file_bytes"] = {"before": 2, "after": 1}
    entries["recovered"] = recovered | {"curve": [[0, 1.0], [2, 0.5]]}
    render_html(Report.model_validate_json(json.dumps(entries)))
    found = entries
    for step in way[:-1]:
        found = found[step]
    found[way[-1]] = value
    with pytest.raises(ValidationError, match=str(way[-1])):
        Report.model_validate_json(json.dumps(entries))


def test_bytes_of_a_name_that_are_no_text_are_written_out() -> None:
    name = os.fsdecode(b"caf\xe9") if os.name == "posix" else "caf\udce9"
    source = CalibrationSummary(source=name, kind="data")
    report = small(model=name, calibration=source, notes=(f"1 file skipped: {name}",))
    assert report.model == report.calibration.source == r"caf\udce9"
    assert report.notes == (r"1 file skipped: caf\udce9",)
    assert Report.model_validate_json(report.model_dump_json()) == report
    for text in (render_text(report), render_markdown(report), render_html(report)):
        assert "udce9" in text and text.encode()
