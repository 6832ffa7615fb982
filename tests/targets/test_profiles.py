"""Times from another machine: graphs that need no torch there, and plans that go by what came back."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import FalseTimer
from commands import INPUT, call, images, small_network

import convrewrite
from convrewrite.errors import PlanError, UsageError
from convrewrite.reporting import render_markdown, render_text
from convrewrite.targets import ORIGINAL, Profile, read_profile

NO_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "scipy"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from convrewrite.cli import main
sys.exit(main(sys.argv[1:]))
"""
FAST = {"fast": True, "refine": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its graphs, and the times that a machine without torch measured on them."""
    folder = tmp_path_factory.mktemp("profile")
    torch.save(small_network(), folder / "model.pt")
    written = call(
        "profile", folder / "model.pt", *INPUT, "--rule", "separable", "--graphs", folder / "graphs", "--fast"
    )
    assert written.code == 0, written.err
    command = [
        sys.executable,
        "-c",
        NO_TORCH,
        "profile",
        str(folder / "graphs"),
        "--fast",
        "-o",
        str(folder / "t.json"),
        "--json",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads((folder / "t.json").read_text())
    return folder


def test_a_plan_goes_by_them_and_says_so(files: Path, tmp_path: Path) -> None:
    """The file is read once: a run that has begun does not end where it is removed."""
    profile, times = read_profile(files / "t.json"), tmp_path / "t.json"
    times.write_bytes((files / "t.json").read_bytes())
    assert profile.runtime == "onnxruntime"
    assert ORIGINAL in profile.seconds
    assert all(seconds > 0 for seconds in profile.seconds.values())
    timer = FalseTimer()
    result = convrewrite.optimize(
        small_network(), images(2)[:1], calibration=images(), timings=str(times), timer=timer, **FAST,
        progress=lambda stage, *_: times.unlink(missing_ok=True) if stage == "fit" else None,
    )  # fmt: skip
    assert not times.exists()
    assert timer.asked == [] and timer.compared == []
    totals = result.report.totals
    assert totals.onnx_latency_seconds is None
    assert result.refused is None
    assert any("not timed here" in note for note in result.report.notes)
    assert totals.predicted_onnx_latency_seconds is not None
    assert 0 < totals.predicted_onnx_latency_seconds < profile.seconds[ORIGINAL]
    assert "latency elsewhere in onnxruntime, predicted" in " ".join(render_markdown(result.report).split())
    for measure in (True, False):  # a recovery is timed here
        recovered = convrewrite.recover(
            result,
            small_network(),
            images(),
            images(2)[:1],
            epochs=0.01,
            features=0.0,
            timer=FalseTimer(),
            measure=measure,
        ).report
        assert measure == (recovered.totals.onnx_latency_seconds is not None) == (recovered.runtime_version is not None)
        assert measure == (not any("not timed here" in note for note in recovered.notes))
        assert any("chosen by times in onnxruntime" in note for note in recovered.notes)


def test_a_budget_of_latency_is_met_as_they_promise(files: Path) -> None:
    found = read_profile(files / "t.json")
    halved = dict.fromkeys(found.seconds, 0.001) | {ORIGINAL: 4e-3}
    lied = Profile(found.runtime, found.version, found.processor, found.block, 1, halved)
    (files / "equal.json").write_text(lied.to_json())
    settings = convrewrite.Settings(budget={"latency": 0.5}, timings=str(files / "equal.json"), fast=True)
    with pytest.raises(PlanError, match=r"latency=0.5 cannot be met"):
        convrewrite.plan(small_network(), images(2)[:1], ["separable"], images(), settings=settings)


def test_the_result_is_told_as_they_predict_it(files: Path) -> None:
    """Every option takes as long as what it replaces here, so that nothing is saved of what the original takes."""
    found = read_profile(files / "t.json")
    equal = dict.fromkeys(found.seconds, 0.001) | {ORIGINAL: 4e-3}
    profile = Profile("openvino", found.version, found.processor, found.block, 1, equal)
    (files / "saves-nothing.json").write_text(profile.to_json())
    result = convrewrite.optimize(
        small_network(), images(2)[:1], calibration=images(), timings=str(files / "saves-nothing.json"), any_speed=True,
        **FAST,
    )  # fmt: skip
    assert any(site.action == "rewritten" for site in result.report.sites)
    assert result.report.totals.predicted_onnx_latency_seconds == pytest.approx(4e-3)
    assert result.report.totals.predicted_in == "openvino"
    assert "| latency elsewhere in openvino, predicted |" in render_markdown(result.report)
    assert "latency elsewhere in openvino" in render_text(result.report)
    earlier = result.report.totals.model_copy(update={"predicted_in": None})  # as an earlier version wrote it
    assert "latency elsewhere, predicted" in render_text(result.report.model_copy(update={"totals": earlier}))


def test_options_that_were_not_timed_are_named(files: Path) -> None:
    with pytest.raises(PlanError, match=r"--timings .*: expected the time of .*, found none; profile this model again"):
        convrewrite.plan(
            small_network(),
            images(2)[:1],
            ["grouped"],
            images(),
            {"latency": 0.9},
            timings=str(files / "t.json"),
            fast=True,
        )


def test_profiling_here_asks_for_the_same_options(files: Path) -> None:
    timer = FalseTimer()
    gone = str(files / "gone.json")  # of which none count
    settings = convrewrite.Settings(fast=True, timer=timer, timings=gone, threads=2)
    here = convrewrite.profile(small_network(), images(2)[:1], ["separable"], settings=settings)
    assert here is not None
    assert here.seconds.keys() == read_profile(files / "t.json").seconds.keys()
    assert here.seconds[ORIGINAL] == timer.file_seconds
    assert (timer.threads, here.threads) == ({2}, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"format": None}, {"format": True}, {"runtime": 3}, {"block": 0}, {"block": True}, {"threads": "1"},
        {"more": 1}, {"seconds": [1]},
        {"seconds": {"a": -1.0}}, {"seconds": {"a": True}}, {"seconds": {"a": "1"}}, {"seconds": {"a": float("nan")}},
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    good = json.loads(Profile("onnxruntime", "1", "a processor", 16, 1, {"a": 1.0}).to_json())
    path = tmp_path / "t.json"
    path.write_text(json.dumps(good | change))
    with pytest.raises(UsageError, match=r"--timings .*: expected a file written by `convrewrite profile`"):
        read_profile(path)
    path.write_text(json.dumps(good))
    assert read_profile(path).seconds == {"a": 1.0}


def test_times_that_stand_twice_are_refused(tmp_path: Path) -> None:
    text = Profile("onnxruntime", "1", "a processor", 16, 1, {"a": 1.0}).to_json()
    (tmp_path / "t.json").write_text(text.replace('"a": 1.0', '"a": 9.0, "a": 1.0'))
    with pytest.raises(UsageError, match="'a': expected once in its object, found more than once"):
        read_profile(tmp_path / "t.json")


@pytest.mark.parametrize(
    "text",
    ["", "[", '{"format": 1}', '{"format": 1, "groups": [{"graphs": ["../a", "b"], "input": [1]}], "inputs": []}',
     '{"format": 1, "groups": [{"graphs": ["a", "b"], "input": [99999, 99999, 99]}], "inputs": []}',
     '{"format": 1, "groups": [], "inputs": [{"shape": [1], "type": "object"}]}',
     '{"format": true, "groups": [], "inputs": [{"shape": [1], "type": "float32"}]}',
     '{"format": 1, "groups": [], "inputs": [{"shape": [true], "type": "float32"}]}',
     '{"format": 1, "groups": [1], "groups": [], "inputs": [{"shape": [1], "type": "float32"}]}'],
)  # fmt: skip
def test_a_folder_that_is_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "graphs.json").write_text(text)
    found = call("profile", tmp_path, "-o", tmp_path / "t.json")
    assert found.code == 2
    assert "expected what `convrewrite profile --graphs` writes" in found.message
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("runtime", ["torch", "torch-compile"])
def test_a_runtime_of_modules_takes_no_folder_of_graphs(files: Path, runtime: str) -> None:
    ran = call("profile", files / "graphs", "--runtime", runtime, "-o", files / "none.json")
    assert ran.code == 2
    assert (
        f"--runtime {runtime}: expected a runtime that takes ONNX files, as {files / 'graphs'} holds them"
        in ran.message
    )
    assert "profile the model itself" in ran.message
    assert not (files / "none.json").exists()


def test_threads_are_those_of_the_times(files: Path) -> None:
    found = read_profile(files / "t.json")
    (files / "two.json").write_text(replace(found, threads=2).to_json())
    asked: dict[str, Any] = {"calibration": images(), "timings": str(files / "two.json"), **FAST}
    assert convrewrite.optimize(small_network(), images(2)[:1], **asked).report.threads == 2
    with pytest.raises(UsageError, match=r"--threads 3: expected the threads that its times are of, 2, found others"):
        convrewrite.optimize(small_network(), images(2)[:1], threads=3, **asked)


def test_options_without_effect_are_noted(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    rules = ("--rule", "separable")
    made = call("profile", "model.pt", *INPUT, *rules, "--graphs", tmp_path / "g", "--threads", 2, "--fast")
    assert "Note: without effect: --threads, --fast, as --graphs times nothing" in made.said
    timed = call("profile", "graphs", *rules, "--trust", "--fast", "-o", tmp_path / "t.json")
    assert "Note: without effect: --rule, --trust, as graphs holds all that is timed" in timed.said
    assert "which holds graphs; time them" in call("profile", "graphs", "--graphs", tmp_path / "h").message


def test_one_place_to_write_to_is_asked_for(files: Path) -> None:
    assert "and one of them" in call("profile", files / "model.pt", *INPUT).message
    there = call("profile", files / "model.pt", *INPUT, "--graphs", files / "graphs")
    assert "expected a new folder for the graphs" in there.message
