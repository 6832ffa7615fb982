"""Every command prints JSON where it is asked, which keeps to the schema that is published, and nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import typer
from clocks import FalseTimer, in_place_of_this_machine
from commands import INPUT, call, images, small_network

from convrewrite.cli import quantising, timing
from convrewrite.cli.commands import app
from convrewrite.cli.grouped import _all
from convrewrite.cli.json_forms import SCHEMAS, QuantisedModel, QuantisedModels, Timings, Verified, VerifiedOutput
from convrewrite.meanings import Fidelity, OutputFidelity
from convrewrite.pipeline import Int8Row
from convrewrite.results import read_plan, read_report
from convrewrite.runtime import Verification
from convrewrite.runtime.parity import OutputParity, Parity
from convrewrite.targets import Comparison, Profile, read_profile

COMMANDS = dict(_all(typer.main.get_command(app), ()))


@pytest.fixture(scope="module", autouse=True)
def untimed() -> Iterator[None]:
    """Latency of results is not measured, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        in_place_of_this_machine(patch, FalseTimer())
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, inputs, and one result of it."""
    folder = tmp_path_factory.mktemp("json")
    torch.save(small_network(), folder / "net.pt")
    np.save(folder / "images.npy", images().numpy())
    words = ("--calib", folder / "images.npy", "--fast", "--seed", 3)
    assert call("optimize", folder / "net.pt", "-o", folder / "out", *words).code == 0
    return folder


def told(schema: str, *words: object, code: int = 0) -> Any:
    """What a command printed, which keeps to the schema."""
    ran = call(*words, "--json")
    assert ran.code == code, ran.err
    found = json.loads(ran.out)
    jsonschema.validate(found, json.loads(call("schema", schema).out))
    return found


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "schema"])
def test_every_command_can_print_json(name: str) -> None:
    assert "--json" in {word for parameter in COMMANDS[name].params for word in parameter.opts}


def test_a_report_of_infinities_keeps_to_its_schema(place: Path) -> None:
    found = told("report", "report", place / "out")
    schema = json.loads(call("schema", "report").out)
    for text, holds in (("Infinity", True), ("NaN", True), ("much", False)):
        found["fidelity"][0]["relative_error"] = text
        assert jsonschema.Draft202012Validator(schema).is_valid(found) == holds


def test_what_a_models_code_prints_is_no_part_of_the_json(tmp_path: Path) -> None:
    (tmp_path / "talks.py").write_text(
        "import torch\nprint('imported')\nclass Net(torch.nn.Sequential):\n    def forward(self, x):\n"
        "        print('run')\n        return super().forward(x)\n"
        "def make():\n    print('made')\n    return Net(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))\n"
    )
    ran = call("analyze", f"{tmp_path / 'talks.py'}:make", "--input", "1x3x8x8", "--json")
    assert ran.code == 0 and len(json.loads(ran.out)) == 2
    assert ran.err.splitlines()[:2] == ["imported", "made"]
    assert call("analyze", f"{tmp_path / 'talks.py'}:make", "--input", "1x3x8x8", "-q").out == ""


def test_the_schemas_are_listed() -> None:
    listed = call("schema")
    assert listed.code == 0
    names = [line.split()[0] for line in listed.out.splitlines()[2:]]
    assert names == list(SCHEMAS)
    for name in names:
        jsonschema.Draft202012Validator.check_schema(json.loads(call("schema", name).out))
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    table = text.partition("## JSON")[2].partition("## verify")[0]
    assert [name for name in names if f"`{name}`" not in table] == []
    said = " ".join(commands for _, commands in SCHEMAS.values())
    assert [name for name in COMMANDS if name != "schema" and name not in said] == []
    assert "expected report, plan, site" in call("schema", "sits").message


def test_verify_says_what_had_to_hold(place: Path) -> None:
    net, out = place / "net.pt", place / "out"
    found = told("verified", "verify", net, out / "model.onnx", "--calib", place / "images.npy")
    assert (found["expected"], found["refused"], found["examples"]) == ("fidelity", None, 80)
    assert found["inputs"] == "calibration inputs" and any("made from" in note for note in found["notes"])
    [output] = found["outputs"]
    assert output["taken_for"] == "logits" and not output["same"] and 0 < output["relative_error"] < 1
    gated = told("verified", "verify", net, out / "model.onnx", *INPUT, "--error", "0.0001", code=1)
    assert "exceeds 0.0001" in gated["refused"]
    same = told("verified", "verify", out, out / "model.onnx", *INPUT)
    assert (same["expected"], same["refused"], same["outputs"][0]["same"]) == ("parity", None, True)
    unlike = told("verified", "verify", net, out, *INPUT, "--expect", "parity", code=1)
    assert unlike["refused"] and unlike["expected"] == "parity"


def test_bench_and_profile_say_what_was_timed(place: Path, tmp_path: Path) -> None:
    file = place / "out" / "model.onnx"
    found = told("benched", "bench", file, file, *INPUT, "--rounds", 3)
    assert found["input_shapes"] == [[1, 3, 16, 16]]
    [row] = found["timings"]
    assert row["runtime"].startswith("onnxruntime") and row["rounds"] == 3
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    graphs, net = tmp_path / "graphs", tmp_path / "one.pt"
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(16, 16, 3)), net)
    assert call("profile", net, *INPUT, "--fast", "--rule", "asymmetric", "--graphs", graphs).code == 0
    times = told("timings", "profile", graphs, "--fast", "-o", tmp_path / "t.json")
    assert times == json.loads((tmp_path / "t.json").read_text())
    assert len(read_profile(tmp_path / "t.json").seconds) == len(times["seconds"])
    refused = call("profile", net, *INPUT, "--graphs", tmp_path / "g", "--json")
    assert refused.code == 2 and refused.message.startswith("--json: expected with -o")


def test_explain_prints_the_plan_or_a_site(place: Path) -> None:
    plan = read_plan(place / "out" / "plan.json")
    assert told("plan", "explain", place / "out") == json.loads(plan.model_dump_json())
    found = told("site", "explain", place / "out", "3")
    assert found["name"] == "3" and found["option"]["structure"] == "separable"
    assert call("explain", place / "out", "nothing", "--json").code == 2


def test_what_is_made_of_a_result_prints_json_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ("--calib", place / "images.npy")
    monkeypatch.setattr(quantising, "warnings_on", lambda rows: (f"{rows[-1].name} is useless",))
    found = told("quantised", "quantise", place / "out", *inputs)
    assert found["warnings"] == [f"{found['models'][-1]['name']} is useless"]
    assert [row["name"] for row in found["models"]][:2] == ["original", "rewritten"]
    assert Path(found["written"]).is_file() and found["models"][0]["relative_error"] == 0
    report = told(
        "report",
        "recover",
        place / "out",
        "--data",
        place / "images.npy",
        "--epochs",
        1,
        "--no-onnx",
        "-o",
        place / "new",
    )
    assert report["recovered"] is not None
    assert report == json.loads(read_report(place / "new").model_dump_json())


def test_rules_print_json(tmp_path: Path) -> None:
    rules = told("rules", "rules", "list")["rules"]
    assert [rule["name"] for rule in rules] == ["asymmetric", "balanced", "grouped", "separable"]
    assert told("rule", "rules", "show", "grouped")["rule"][0]["name"] == "grouped"
    file = tmp_path / "mine.toml"
    head = 'schema = 1\n[[rule]]\nname = "mine"\nstructures = ["separable"]\nmatch = { kind = ["standard"] }\n'
    file.write_text(head + "[[rule.accepts]]\nconv = { in_channels = 64, out_channels = 64, kernel_size = [3, 3] }\n")
    good = told("checked", "rules", "check", file)
    assert good["passed"] and len(good["examples"]) == 1
    file.write_text(head + "[[rule.accepts]]\nconv = { in_channels = 64, out_channels = 64, kernel_size = [1, 1] }\n")
    bad = told("checked", "rules", "check", file, code=1)
    assert not bad["passed"] and not bad["examples"][0]["passed"]


def test_a_list_of_one_is_a_list(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(3, 8, 3), tmp_path / "one.pt")
    ran = call("analyze", tmp_path / "one.pt", *INPUT, "--json")
    assert len(json.loads(ran.out)) == 1


def test_numbers_that_json_does_not_have_are_null() -> None:
    profile = Profile("onnxruntime", "1", "a processor", 8, 1, {"a": 1.5, "b": float("inf")})
    assert Timings.model_validate_json(profile.to_json()).seconds == {"a": 1.5, "b": None}
    numbers = dict.fromkeys(
        (
            "max_abs_difference", "parity_error", "relative_error", "unexplained", "top1_agreement", "kl", "cosine",
            "equal_share",
        )
    )  # fmt: skip
    output = VerifiedOutput(name="o", taken_for="values", tolerance=1e-3, same=False, **numbers | {"kl": float("nan")})
    text = Verified(
        a="a",
        b="b",
        examples=1,
        inputs="random inputs",
        expected="parity",
        outputs=(output,),
        left_out=(),
        notes=(),
        refused=None,
    ).model_dump_json()
    assert json.loads(text)["outputs"][0]["kl"] is None


def test_every_figure_stands_under_its_own_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON and as a line of a table: each is another number here."""
    near = OutputFidelity("y", 0.11, 0.12, 0.13, 0.14, 0.15, "logits", 0.16)
    same = OutputParity("y", 0.21, 0.22, 0.24, True, 0.23)
    outcome = Verification(Parity((same,), 1), Fidelity((near,), 1))
    said = {"a": "a", "b": "b", "examples": 1, "inputs": "random inputs", "expected": "parity", "refused": None}
    [output] = Verified.of(outcome, **said).outputs
    assert output.model_dump() == {
        "name": "y", "taken_for": "logits", "max_abs_difference": 0.21, "parity_error": 0.22, "tolerance": 0.24, "same": True,
        "relative_error": 0.11, "unexplained": 0.16, "top1_agreement": 0.12, "kl": 0.13, "cosine": 0.15, "equal_share": 0.14,
    }  # fmt: skip
    row = Int8Row("int8", 3100, 3200, 0.33, Fidelity((near,), 1), 0.34, "one way")
    assert QuantisedModel.of(row).model_dump() == {
        "name": "int8", "bytes": 3100, "macs": 3200, "latency": 0.33, "relative_error": 0.11, "top1_agreement": 0.12,
        "kl": 0.13, "float_error": 0.34, "how": "one way",
    }  # fmt: skip
    assert quantising.table([row]).splitlines()[-1].split() == [
        "int8", "3,100", "3,200", "0.33x", "11.00%", "12.00%", "0.13", "34.00%", "one", "way",
    ]  # fmt: skip
    warned = quantising.told([row]).partition("Warning: the int8 does not compute the same any more as the original: ")[
        2
    ]
    assert warned.startswith("equal entries of y 14.00%; use model.onnx")
    [same_warning] = QuantisedModels.of([row], place, quantising.warnings_on([row])).warnings
    assert same_warning.endswith(warned)
    timed = Comparison("there", 1, 3, 0.041, 0.082, 2.0, 1.5, 2.5)
    monkeypatch.setattr(timing, "_compared", lambda *_: [timed])
    ran = call("bench", *[place / "out" / "model.onnx"] * 2, *INPUT)
    assert "there 41.0 ms 82.0 ms 2.000 1.500 to 2.500 0.50x" in ran.said
