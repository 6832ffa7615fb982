"""``plan``, ``apply`` and ``explain``; and results that are no success though everything ran."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clocks import FalseTimer, compared, in_place_of_this_machine
from commands import INPUT, Ran, call, images, listing, small_network
from torch import nn

from convrewrite.inputs import Inputs
from convrewrite.meanings.evaluation import Evaluation
from convrewrite.pipeline import run
from convrewrite.planning import choice
from convrewrite.reporting.report import Report
from convrewrite.results import folder as results
from convrewrite.results import read_plan
from convrewrite.results.folder import FILES
from convrewrite.runtime import exporting, measurement
from convrewrite.runtime.measurement import Measured
from convrewrite.runtime.onnx_export import Exported

RULE = ("--rule", "separable")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, inputs, and files that are no plans."""
    folder = tmp_path_factory.mktemp("place")
    torch.save(small_network(), folder / "net.pt")
    torch.save(small_network(seed=5), folder / "other.pt")
    torch.save(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)), folder / "third.pt")
    torch.save(small_network().double(), folder / "double.pt")
    np.save(folder / "images.npy", images().numpy())
    (folder / "text.json").write_text("this is no plan")
    (folder / "list.json").write_text("[1, 2]")
    (folder / "noise.json").write_bytes(bytes(range(256)))
    (folder / "file").write_text("in the way")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every clock lies: options take what their MACs say, and the result half of the original's time."""
    in_place_of_this_machine(monkeypatch, FalseTimer(0.5))


@pytest.fixture(scope="module")
def planned(place: Path) -> Ran:
    """Made once, before any test's own clock lies: this one lies too, or a busy machine would choose other lowerings."""
    with pytest.MonkeyPatch.context() as patch:
        in_place_of_this_machine(patch, FalseTimer())
        return call(
            "plan", place / "net.pt", "-o", place / "plan.json", *RULE, "--calib", place / "images.npy",
            "--budget", "macs=0.6", "--fast", "--seed", 3,
        )  # fmt: skip


@pytest.fixture(scope="module")
def plan_file(place: Path, planned: Ran) -> Path:
    assert planned.code == 0, planned.err
    return place / "plan.json"


# --- plan


def test_plan_writes_and_shows_a_plan(place: Path, planned: Ran, plan_file: Path) -> None:
    made = read_plan(plan_file)
    assert (made.budget, made.seed, made.rules) == ({"macs": 0.6}, 3, ("separable",))
    assert "asked: macs=0.6" in planned.said
    assert "promised: macs 0." in planned.said
    assert [site.name for site in made.sites] == ["0", "3", "6", "8"]
    for site in made.sites:
        assert any(line.split()[:1] == [site.name] for line in planned.out.splitlines())
    assert "the budget is met with less harm elsewhere" in planned.said and "kept [1]" in planned.said
    assert made.site("0").considered  # a stem with a tenth of the network's MACs, within a budget
    assert "Note: input size 1x3x16x16 taken from" in planned.said
    assert planned.said.endswith(f"Written to {plan_file}")
    assert "survey" in planned.err
    assert "fit" not in planned.err.split()
    assert not [name for name in listing(place) if name.startswith(".")]


def test_a_plan_goes_into_a_new_folder_and_over_an_older_one(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "p.json"
    for seed in (1, 2):
        ran = call("plan", place / "net.pt", "-o", target, *RULE, *INPUT, "--calib", "weights", "--seed", seed)
        assert ran.code == 0, ran.err
        assert read_plan(target).seed == seed
        assert listing(tmp_path) == {"new", "new/folder", "new/folder/p.json"}


def test_an_interrupted_plan_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(choice, "survey", interrupt)
    options = ("-o", tmp_path / "p.json", *INPUT, "--calib", "weights", "--budget", "macs=0.6")
    ran = call("plan", place / "net.pt", *options)
    assert (ran.code, ran.message) == (130, "interrupted; nothing was written")
    assert listing(tmp_path) == set()


def test_balanced_is_what_plans_choose_from(place: Path, tmp_path: Path) -> None:
    ran = call("plan", place / "net.pt", "-o", tmp_path / "p.json", *INPUT, "--calib", "weights")
    assert ran.code == 0, ran.err
    assert read_plan(tmp_path / "p.json").rules == ("balanced",)


# --- apply


def test_a_plan_that_is_applied_gives_what_optimize_gives(place: Path, plan_file: Path, tmp_path: Path) -> None:
    calib = ("--calib", place / "images.npy")
    applied = call("apply", place / "net.pt", plan_file, "-o", tmp_path / "applied", *calib)
    assert applied.code == 0, applied.err
    budget = (*RULE, "--budget", "macs=0.6", "--fast", "--seed", 3)
    whole = call("optimize", place / "net.pt", "-o", tmp_path / "whole", *calib, *budget)
    assert whole.code == 0, whole.err
    assert listing(tmp_path / "applied") == set(FILES)
    for name in ("weights.safetensors", "plan.json"):
        assert (tmp_path / "applied" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert (tmp_path / "applied" / "plan.json").read_bytes() == plan_file.read_bytes()
    report = Report.model_validate_json((tmp_path / "applied" / "report.json").read_text())
    assert report.asked.budget == {"macs": 0.6}
    assert f"input size 1x3x16x16 taken from {place / 'images.npy'}" in report.notes
    assert [command.split()[1] for command in report.commands] == ["apply"]
    reached = report.reached.budget["macs"]
    assert reached is not None
    assert reached <= 0.6
    assert report.refused is None
    again = call("apply", place / "net.pt", tmp_path / "whole" / "plan.json", "-o", tmp_path / "again", *calib)
    assert again.code == 0, again.err


# --- explain


def test_explain_shows_a_plan_or_a_site_of_it(planned: Ran, plan_file: Path) -> None:
    whole = call("explain", plan_file)
    assert whole.code == 0, whole.err
    assert whole.out.strip() in planned.out
    one = call("explain", plan_file, "3")
    assert one.code == 0, one.err
    made = read_plan(plan_file).site("3")
    assert one.out.startswith(f"3: standard {made.geometry}\n")
    assert "Errors and effects are those with only this site rewritten." in one.said
    assert sum(line.startswith(">") for line in one.out.splitlines()) == (made.option is not None)
    kept = call("explain", plan_file, "0")
    assert kept.out.splitlines()[1] == "kept: the budget is met with less harm elsewhere"


def test_explain_takes_a_result_folder(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(plan_file.read_bytes())
    assert call("explain", tmp_path).out == call("explain", plan_file).out
    assert call("explain", tmp_path, "6").out == call("explain", plan_file, "6").out


# --- what is wrong


def test_wrong_arguments(place: Path, plan_file: Path) -> None:
    made = json.loads(plan_file.read_text())
    changes: dict[str, Callable[[dict[str, object]], None]] = {
        "version.json": lambda plan: plan.update(schema_version=2),
        "budget.json": lambda plan: plan.update(budget={"flops": 0.5}),
        "keep.json": lambda plan: plan.update(keep={"agreement": 98}),
        "key.json": lambda plan: plan.update(surprise=1),
    }
    for name, change in changes.items():
        wrong = json.loads(json.dumps(made))
        change(wrong)
        (place / name).write_text(json.dumps(wrong))
    known = {path.name for path in place.iterdir()} | {"missing.json", "missing.pt", "out"}
    before = listing(place)
    failures = []
    for arguments, code, parts in WRONG:
        ran = call(*(place / value if value.partition("/")[0] in known else value for value in arguments))
        if ran.code != code or [part for part in parts if part not in ran.message] or ran.out:
            failures.append((arguments, ran.code, ran.message, ran.out))
        assert listing(place) == before, arguments
    assert failures == []


WRONG: list[tuple[list[str], int, list[str]]] = [
    (["plan", "net.pt", "-o", "empty"], 2, ["empty: expected a file for the plan, found a folder", "plan.json"]),
    (["plan", "net.pt", "-o", "file/p.json"], 2, ["file/p.json: cannot be written", "name another file with -o"]),
    (["plan", "missing.pt", "-o", "empty"], 2, ["found a folder"]),  # before the model is loaded
    (["plan", "missing.pt", "-o", "out"], 3, ["missing.pt: no such file"]),
    (["plan", "double.pt", "-o", "out", *INPUT], 3, ["float64", "model.float()"]),
    (["plan", "net.pt", "-o", "out", "--rule", "seperable"], 2, ["did you mean separable?"]),
    (["plan", "net.pt", "-o", "out", *INPUT, "--budget", "macs=0.01"], 2, ["macs=0.01 cannot be met", "at the least"]),
    (["plan", "net.pt", "-o", "out", *INPUT, "--budget", "time=0.5"], 2, ["'time'", "macs, params, latency"]),
    (["plan", "net.pt", "-o", "out", "--keep", "much"], 2, ["--keep: expected a number as 0.98", "'much'"]),
    (["plan", "net.pt", "-o", "out", *INPUT, "--keep", "0.9", "--calib", "weights"], 2, ["needs inputs", "--calib"]),
    (["apply", "net.pt"], 2, ["PLAN", "--help"]),
    (["apply", "net.pt", "missing.json", "-o", "out"], 2, ["missing.json: cannot be read", "plan"]),
    (["apply", "net.pt", "empty", "-o", "out"], 2, ["empty: cannot be read, it is a folder", "convrewrite plan"]),
    (["apply", "net.pt", "text.json", "-o", "out"], 2, ["text.json: the file: ", "expected a plan written by"]),
    (["apply", "net.pt", "list.json", "-o", "out"], 2, ["list.json: the file: "]),
    (["apply", "net.pt", "noise.json", "-o", "out"], 2, ["noise.json: expected a plan", "UTF-8"]),
    (["apply", "net.pt", "net.pt", "-o", "out"], 2, ["net.pt: expected a plan", "UTF-8"]),
    (["apply", "net.pt", "version.json", "-o", "out"], 2, ["version.json: schema_version: "]),
    (["apply", "net.pt", "key.json", "-o", "out"], 2, ["key.json: surprise: "]),
    (["apply", "net.pt", "budget.json", "-o", "out"], 2, ["budget.json: budget 'flops': expected one of macs"]),
    (["apply", "net.pt", "keep.json", "-o", "out"], 2, ["keep.json: keep: expected agreement in (0, 1)"]),
    (["apply", "other.pt", "plan.json", "-o", "out", *INPUT], 2, ["with other weights; give the original"]),
    (["apply", "third.pt", "plan.json", "-o", "out", *INPUT], 2, ["made for another model", "the original model"]),
    (["apply", "missing.pt", "plan.json", "-o", "out"], 3, ["missing.pt: no such file"]),
    (["apply", "net.pt", "plan.json", "-o", "file"], 2, ["file: expected a folder for the results, found a file"]),
    (["apply", "net.pt", "plan.json", "-o", "file/below"], 2, ["file/below: cannot be written"]),
    (["apply", "net.pt", "plan.json", "-o", "out", "--budget", "macs=0.5"], 2, ["No such option: --budget"]),
    (["explain"], 2, ["OUT", "--help"]),
    (["explain", "missing.json"], 2, ["missing.json: cannot be read"]),
    (["explain", "empty"], 2, ["plan.json: cannot be read", "convrewrite plan"]),
    (["explain", "text.json"], 2, ["text.json: the file: "]),
    (["explain", "plan.json", "7"], 2, ["the plan has no site '7'; its sites are 0, 3, 6, 8"]),
]


# --- results that are no success


def optimized(place: Path, out: Path, *options: object) -> Ran:
    return call("optimize", place / "net.pt", "-o", out, *RULE, "--calib", place / "images.npy", "--fast", *options)


def test_a_result_that_measures_slower_is_written_and_is_no_success(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_this_machine(monkeypatch, FalseTimer(1.3))
    ran = optimized(place, tmp_path / "out")
    assert ran.code == 1
    assert "the rewritten model is slower than the original: 1.30 of its time in onnxruntime; plan with" in ran.message
    assert "--budget latency=0.6" in ran.message
    assert "or with --any-speed if time does not matter" in ran.message
    assert listing(tmp_path / "out") == set(FILES)
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.refused == ran.message
    assert f"Written to {tmp_path / 'out'}" in ran.said


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Nothing is exported, which takes seconds; gives what sets the ratio of times that is told instead."""

    def pretend(_model: nn.Module, _inputs: Inputs, path: Path, **_named: object) -> Exported:
        path.touch()
        path.with_name("model.onnx").touch()
        return Exported(path, True)

    def set_ratio(ratio: float) -> None:
        def measure(
            original: nn.Module, rewritten: nn.Module, _inputs: Inputs, evaluation: Evaluation, *_: object
        ) -> Measured:
            latency = compared(ratio)()
            return replace(measurement.measure_outputs(original, rewritten, evaluation), onnx_latency=latency)

        monkeypatch.setattr(exporting, "export", pretend)
        monkeypatch.setattr(run, "measure_everything", measure)

    return set_ratio


@pytest.mark.parametrize(
    ("options", "ratio", "code"),
    [
        (("--budget", "macs=0.6"), 1.3, 1),
        (("--budget", "macs=0.6", "--any-speed"), 1.3, 0),
        (("--budget", "macs=0.7,params=0.7", "--any-speed"), 1.3, 0),
        (("--keep", "error=0.9"), 1.3, 1),
        ((), 1.3, 1),
        ((), 1.005, 0),  # a quarter of the rounds found it faster: as fast as the original
        ((), 0.9, 0),
    ],
    ids=str,
)
def test_time_matters_unless_any_speed_was_asked_for(
    place: Path, tmp_path: Path, unexported: Callable[[float], None], options: tuple[str, ...], ratio: float, code: int
) -> None:
    unexported(ratio)
    ran = optimized(place, tmp_path / "out", *options)
    assert ran.code == code, ran.err
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert (report.refused is not None) == (code == 1)
    assert report.totals.onnx_latency_seconds is not None
    assert report.totals.onnx_latency_seconds.ratio == ratio, "it is told all the same"


def test_an_applied_plan_is_held_to_what_it_was_made_for(
    place: Path, plan_file: Path, tmp_path: Path, unexported: Callable[[float], None]
) -> None:
    unexported(1.3)
    inputs = ("--calib", place / "images.npy")
    at_any_speed = read_plan(plan_file).model_copy(update={"any_speed": True})
    results.save_plan(at_any_speed, tmp_path / "any.json")
    assert call("apply", place / "net.pt", tmp_path / "any.json", "-o", tmp_path / "a", *inputs).code == 0
    by_ratio = read_plan(plan_file).model_copy(update={"budget": {}})
    results.save_plan(by_ratio, tmp_path / "ratio.json")
    ran = call("apply", place / "net.pt", tmp_path / "ratio.json", "-o", tmp_path / "b", *inputs)
    assert ran.code == 1
    assert "slower than the original" in ran.message
    assert "plan.json" in listing(tmp_path / "b")


def test_a_budget_that_loses_more_than_was_to_be_kept_is_no_success(
    place: Path, tmp_path: Path, unexported: Callable[[float], None]
) -> None:
    unexported(0.5)
    ran = optimized(place, tmp_path / "out", "--budget", "macs=0.35", "--keep", "error=0.00001")
    assert ran.code == 1
    assert "asked to keep a relative output error of at most 1e-05, measured 0." in ran.message
    assert "give the budget more room" in ran.message
    followed = tmp_path / "out" / "plan.json"
    assert read_plan(followed).keep == {"error": 0.00001}
    applied = call("apply", place / "net.pt", followed, "-o", tmp_path / "a", "--calib", place / "images.npy")
    assert (applied.code, applied.message) == (1, ran.message)


def test_a_fidelity_that_cannot_be_kept_writes_nothing(
    place: Path, tmp_path: Path, unexported: Callable[[float], None]
) -> None:
    unexported(0.5)
    ran = optimized(place, tmp_path / "out", "--keep", "error=0.0000001")
    assert ran.code == 2
    assert "no plan that was tried keeps a relative output error of at most 1e-07" in ran.message
    assert listing(tmp_path) == set()
