"""Commands that were given no sizes take those that a report tells, and say so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from clocks import FalseTimer, in_place_of_this_machine
from commands import INPUT, Ran, call, small_network
from torch import nn

from convrewrite.cli.known_sizes import sizes_of
from convrewrite.errors import UsageError
from convrewrite.loading import runs_on
from convrewrite.pipeline.networks import example_for
from convrewrite.results import read_report

SHAPE = (1, 3, 16, 16)
QUICK = ("--calib", "weights", "--any-speed")
NOTE = "input size 1x3x16x16 taken from"
ASSUMED = "input size assumed 1x3x224x224; pass --input to change it"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, and a result whose ONNX file takes images of any size."""
    folder = tmp_path_factory.mktemp("sizes")
    torch.save(small_network(), folder / "net.pt")
    with pytest.MonkeyPatch.context() as patch:
        in_place_of_this_machine(patch, FalseTimer())
        free = ("--free-axes", "batch,height,width")
        ran = call("optimize", folder / "net.pt", *INPUT, *QUICK, *free, "-o", folder / "out")
    assert ran.code == 0, ran.err
    return folder


def notes(ran: Ran) -> list[str]:
    assert ran.code == 0, ran.err
    return ran.said.split(" Note: ")[1:]


@pytest.mark.parametrize("pair", ["net.pt out", "out net.pt", "net.pt out/model.pt", "out out/model.onnx"])
def test_verify_and_bench_take_the_sizes_of_a_result(place: Path, pair: str) -> None:
    files = [place / name for name in pair.split()]
    ran = call("bench", *files, "--rounds", 3)
    assert notes(ran) == [f"{NOTE} {place / 'out' / 'report.json'}"]
    assert "input 1x3x16x16, 1 thread" in ran.said
    assert f"{NOTE} {place / 'out' / 'report.json'}" in call("verify", *files).said


def test_json_tells_them_too(place: Path) -> None:
    found = json.loads(call("bench", place / "net.pt", place / "out", "--rounds", 3, "--json").out)
    assert found["input_shapes"] == [list(SHAPE)] and found["notes"][0].startswith(NOTE)


@pytest.mark.parametrize("name", ["model.pt", "model.onnx"])
def test_what_looks_at_one_model_takes_the_sizes_of_its_result(place: Path, tmp_path: Path, name: str) -> None:
    file = place / "out" / name
    assert NOTE in call("analyze", file).said
    ran = call("plan", file, *QUICK, "--no-onnx", "-o", tmp_path / "plan.json")
    assert NOTE in ran.said, ran.err


def test_what_is_given_comes_first(place: Path) -> None:
    ran = call("bench", place / "net.pt", place / "out", "--input", "1x3x8x8", "--rounds", 3)
    assert "input 1x3x8x8" in ran.said and not notes(ran)


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_a_size_that_nothing_tells_is_assumed_and_stated(place: Path, command: str) -> None:
    assert ASSUMED in call(command, place / "net.pt", place / "net.pt").said


def test_an_export_takes_the_sizes_of_its_result(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    ran = call("export", tmp_path / "out", "--to", "torch_export")
    assert ran.code == 0, ran.err
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    assert tuple(program.example_inputs[0][0].shape[1:]) == SHAPE[1:]


def test_only_reports_of_this_tool_and_files_of_their_results_count(place: Path, tmp_path: Path) -> None:
    known = sizes_of(place / "net.pt", place / "out" / "model.pt")
    assert known is not None and known.shapes == (SHAPE,)
    assert sizes_of(place / "net.pt") is None and sizes_of(f"{place / 'net'}.py:make") is None
    shutil.copy(place / "out" / "report.json", tmp_path / "report.json")
    assert sizes_of(tmp_path / "other.pt") is None and sizes_of(tmp_path) is not None
    (tmp_path / "report.json").write_text('{"accuracy": 0.9}')
    assert sizes_of(tmp_path) is None and sizes_of(tmp_path / "model.pt") is None


def test_sizes_that_a_model_does_not_take_are_no_sizes_of_its_own(place: Path, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)).eval()
    assert runs_on(net, [(1, 3, 32, 32)]) and not runs_on(net, [SHAPE]) and not runs_on(net, [SHAPE, SHAPE])
    torch.save(net, tmp_path / "model.pt")
    shutil.copy(place / "out" / "report.json", tmp_path / "report.json")
    assert "input size assumed 1x3x32x32" in call("analyze", tmp_path / "model.pt").said


def test_a_report_of_enormous_inputs_makes_no_run_on_such(place: Path, tmp_path: Path) -> None:
    out = shutil.copytree(place / "out", tmp_path / "out")
    assert sizes_of(out) is not None
    told = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(told | {"input_shapes": [[1, 3, 40_000, 40_000]]}))
    assert sizes_of(out) is None
    with pytest.raises(UsageError, match="expected at most 1073741824 numbers by the report, found 4800000000"):
        example_for(read_report(out), small_network(), None)
