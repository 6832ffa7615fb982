"""Commands that look at what was made, sites named on the command line, defaults, and JSON for programs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from networks import natural, settled
from torch import nn

from convrewrite import Plan, optimize, plan
from convrewrite.cli import main
from convrewrite.cli.interrupts import Interrupted, tells_what_stands
from convrewrite.errors import UsageError
from convrewrite.folders import placing
from convrewrite.reporting import Report
from convrewrite.rules.schema import Protect, Rule

RULES = """schema = 1
[[rule]]
name = "r"
structures = ["channel", "asymmetric"]
ratio = 0.7
protect = { stem = false, min_channels = 0, min_mac_share = 0.0 }
"""
RULE = Rule(
    name="r",
    structures=("channel", "asymmetric"),
    protect=Protect(stem=False, min_channels=0, min_mac_share=0),
    ratio=0.7,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of sites 0, 2 and 4, inputs, a rule, and one result, in the place that it has by default."""
    folder = tmp_path_factory.mktemp("looking")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    torch.save(settled(nn.Sequential(*layers)), folder / "small.pt")
    torch.save(natural(24, 3, 8, 8, torch.float32), folder / "inputs.pt")
    (folder / "r.toml").write_text(RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "--no-refine"]) in (0, 1)
    return folder


WORDS = ["optimize", "small.pt", "--rule", "r.toml", "--calib", "inputs.pt", "--no-onnx"]


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def schema_of(name: str, capsys: Any) -> Any:
    capsys.readouterr()
    assert main(["schema", name]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_result_without_a_place_is_called_after_its_model(place: Path) -> None:
    assert (place / "small-rewritten" / "report.json").is_file()


def test_a_report_is_shown_again_and_as_json(capsys: Any) -> None:
    assert main(["report", "small-rewritten"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "small.pt" in shown and "rank" in shown and "fitted on" in shown
    schema = schema_of("report", capsys)
    assert main(["report", "small-rewritten", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    jsonschema.validate(told, schema)
    assert told == json.loads(Path("small-rewritten/report.json").read_text())


def test_the_page_is_opened_where_it_was_asked(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda page: opened.append(page) is None and len(opened) == 1)
    assert main(["report", "small-rewritten", "--open"]) == 0
    assert opened == [Path("small-rewritten/report.html").absolute().as_uri()]
    capsys.readouterr()
    assert main(["report", "small-rewritten", "--open"]) == 2  # no browser can be started
    assert "--open: expected a browser to show /" in capsys.readouterr().err


def test_results_stand_side_by_side(capsys: Any, tmp_path: Path) -> None:
    schema = schema_of("compared", capsys)
    page = tmp_path / "both.html"
    assert main(["compare", "small-rewritten", "small-rewritten", "--page", str(page)]) == 0
    said = capsys.readouterr().out
    assert said.count("small-rewritten") >= 2
    assert "".join(said.split()).endswith("".join(f"Written to {page}".split()))
    assert page.read_text().count("<tr>") == 3 and "://" not in page.read_text()
    assert main(["compare", "small-rewritten", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    jsonschema.validate(told, schema)
    report = Report.model_validate_json(Path("small-rewritten/report.json").read_text())
    assert told["results"][0]["macs"] == report.totals.macs.ratio
    assert main(["compare", "small-rewritten", "--page", str(page)]) == 2  # which is there already
    assert main(["compare", "nowhere"]) != 0
    assert main(["schema", "nothing"]) == 2


def test_a_plan_without_a_budget_is_what_optimize_does(capsys: Any) -> None:
    capsys.readouterr()
    assert main(["plan", *WORDS[1:], "-o", "p.json", "--json"]) == 0
    made = Plan.from_json(Path("p.json").read_text(), "p.json")
    followed = Plan.from_json(Path("small-rewritten/plan.json").read_text(), "plan.json")
    assert [site.option for site in made.sites] == [site.option for site in followed.sites]
    assert any(site.option for site in made.sites)
    assert Plan.from_json(capsys.readouterr().out, "stdout") == made
    assert main(["plan", *WORDS[1:], "-o", "p.json", "--refine"]) == 2  # a plan refines nothing


def test_analyze_prints_json(capsys: Any) -> None:
    schema = schema_of("sites", capsys)
    assert main(["analyze", "small.pt", "--input", "1x3x8x8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["0", "2", "4"]
    for row in rows:
        jsonschema.validate(row, schema)


@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_an_interrupt_behind_a_page_tells_that_it_is_there(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    put, page = placing.put, tmp_path / "page.html"

    def interrupted(*given: Any) -> None:
        put(*given)
        raise KeyboardInterrupt

    source = ["analyze", "small.pt", "--input", "1x3x8x8"] if command == "analyze" else ["compare", "small-rewritten"]
    with monkeypatch.context() as patch:
        patch.setattr(placing, "put", interrupted)
        assert main([*source, "--page", str(page)]) == 130
    assert capsys.readouterr().err == f"convrewrite: interrupted; {page} holds the new result, whole\n"
    monkeypatch.setattr(
        "convrewrite.reporting.Compared.of" if command == "compare" else "convrewrite.pipeline.analyze", interrupt
    )
    assert main(source) == 130
    assert capsys.readouterr().err == "convrewrite: interrupted; nothing was written\n"


def interrupt(*_given: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_tells_of_the_int8_file_alone(tmp_path: Path) -> None:
    """The folder that it is put into stays."""

    @tells_what_stands
    def quantise(*, out: Path, text: str | None) -> None:
        if text is not None:
            (out / "new").write_text(text)
            (out / "new").replace(out / "model.int8.onnx")
        raise KeyboardInterrupt

    (tmp_path / "plan.json").touch()
    for text, told in (
        (None, "nothing was written"),
        ("one", r"int8\.onnx holds the new"),
        ("two", r"int8\.onnx holds the new"),
        (None, r"what stood in .*int8\.onnx before stands"),
    ):
        with pytest.raises(Interrupted, match=told):
            quantise(out=tmp_path, text=text)


def test_sites_are_left_out_and_chosen_by_name() -> None:
    model = torch.load("small.pt", weights_only=False)
    inputs = torch.load("inputs.pt")

    def kept(**options: Any) -> dict[str, str]:
        result = optimize(model, inputs[:1], [RULE], inputs, measure=False, fast=True, **options)
        return {row.name: str(row.reason) for row in result.report.sites if row.action == "kept"}

    assert kept(exclude=("2",)) == {"2": "left out by exclude=2"}
    assert set(kept(only=("[24]",), exclude=("4",))) == {"0", "4"}
    for options in ({"exclude": ("layer9.*",)}, {"only": ("nothing",)}):
        with pytest.raises(UsageError, match="expected a site's name"):
            plan(model, inputs[:1], [RULE], inputs, measure=False, **options)


def test_verify_takes_what_optimize_takes_of_inputs(capsys: Any, tmp_path: Path) -> None:
    from PIL import Image

    for index in range(3):
        Image.new("RGB", (20, 16), (40 * index, 90, 200)).save(tmp_path / f"{index}.png")
    words = ["--calib", str(tmp_path), "--input", "1x3x8x8", "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"]
    assert main(["verify", "small.pt", "small.pt", *words, "--resize", "10x10"]) == 0
    first = capsys.readouterr().out
    assert "3 calibration inputs" in first
    assert main(["verify", "small.pt", "small.pt", "--mean", "0.5,0.5,0.5"]) == 2


def test_commands_without_a_report_say_how_inputs_were_read(capsys: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32))
    words = ["--calib", str(tmp_path / "x.npy"), "--resize", "10x10"]
    for command in (["verify", "small.pt", "small.pt"], ["plan", "small.pt", "--rule", "separable", "-o", "plan.json"]):
        assert main([*command, *words]) == 0
        assert "resize counts for images of a folder alone" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["optimize", "--help"]])
def test_pipes_get_no_colours_and_no_lines_that_are_too_long(words: list[str]) -> None:
    for colour in ({"NO_COLOR": "1"}, {}):
        environment = {**os.environ, **colour, "PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run(
            [sys.executable, "-m", "convrewrite", *words], capture_output=True, text=True, env=environment, check=True
        )
        assert "\x1b" not in ran.stdout + ran.stderr
        assert max(map(len, ran.stdout.splitlines())) <= 200


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ('"schema_version": 1', '"schema_version": true', "schema_version: Value error, Input should not be true or false"),
        ('"seed": 0', '"seed": 1, "seed": 0', "'seed': expected once in its object, found more than once"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_report_that_says_two_things_is_refused(
    command: str, before: str, after: str, found: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    text = (place / "small-rewritten" / "report.json").read_text(encoding="utf-8")
    assert text.count(before) == 1
    (tmp_path / "report.json").write_text(text.replace(before, after), encoding="utf-8")
    assert main([command, str(tmp_path)]) == 3
    assert capsys.readouterr().err == (
        f"convrewrite: {tmp_path}/report.json: {found}; expected a report written by this tool\n"
    )
