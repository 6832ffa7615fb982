"""The commands where all goes well, and what they say where a gate fails."""

import json
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from clocks import FalseTimer, in_place_of_this_machine
from commands import INPUT, Ran, call, images, listing, small_network
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import convrewrite
from convrewrite.cli import interrupts
from convrewrite.graph import finding
from convrewrite.planning import choice
from convrewrite.reporting.report import Report
from convrewrite.results import folder as results
from convrewrite.results.folder import FILES
from convrewrite.rules.files import builtin_rules, load_rule_file
from convrewrite.runtime import measurement


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    torch.save(small_network(), folder / "net.pt")
    torch.save(small_network(seed=5), folder / "other.pt")
    np.save(folder / "images.npy", images().numpy())
    return folder


@pytest.fixture(scope="module")
def optimized(place: Path) -> Ran:
    """``optimize`` without --input, results in ``out``."""
    return call("optimize", place / "net.pt", "-o", place / "out", "--calib", place / "images.npy", "--seed", 3)


@pytest.fixture(scope="module")
def out(place: Path, optimized: Ran) -> Path:
    assert optimized.code == 0, optimized.err
    return place / "out"


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the measuring of latency, which takes seconds."""
    in_place_of_this_machine(monkeypatch, FalseTimer())


def test_optimize_writes_every_file_and_prints_the_report(place: Path, optimized: Ran, out: Path) -> None:
    assert listing(out) == set(FILES)
    assert listing(place) == {"net.pt", "other.pt", "images.npy", "out", *(f"out/{name}" for name in FILES)}
    assert "2 of 4 convolution sites rewritten" in optimized.said
    assert f"Written to {out}: model.onnx, model.pt, plan.json" in optimized.said
    assert "verify" in optimized.err
    assert "fit" in optimized.err


def test_optimize_takes_the_input_size_from_the_calibration_inputs(out: Path) -> None:
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.input_shapes == ((1, 3, 16, 16),)
    assert any("input size 1x3x16x16 taken from" in note for note in report.notes)
    assert report.seed == 3
    assert report.calibration.fitted_on == 64
    assert report.calibration.held_out == 16


def test_optimize_assumes_and_states_an_input_size(place: Path) -> None:
    ran = call("analyze", place / "net.pt")
    assert ran.code == 0
    assert "Note: input size assumed 1x3x224x224; pass --input to change it" in ran.said


def test_files_can_be_read_by_everyone_who_can_read_the_folder(out: Path) -> None:
    assert {path.stat().st_mode & 0o444 for path in out.iterdir()} == {0o444}


@pytest.mark.usefixtures("untimed")
def test_optimize_replaces_an_earlier_result(place: Path, out: Path) -> None:
    (place / "again").mkdir()
    (place / "again" / "report.md").write_text("an earlier report")
    ran = call("optimize", place / "net.pt", "-o", place / "again", *INPUT, "--calib", "weights")
    assert ran.code == 0, ran.err
    assert listing(place / "again") == set(FILES)
    assert "an earlier report" not in (place / "again" / "report.md").read_text()
    report = Report.model_validate_json((place / "again" / "report.json").read_text())
    assert report.calibration.kind == "weights only"


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("module", "stage"),
    [(finding, "find_sites"), (choice, "rewrite"), (measurement, "check_parity"), (results, "render_html")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interrupted_run_leaves_nothing(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, module: object, stage: str
) -> None:
    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    before = listing(place)
    monkeypatch.setattr(module, stage, interrupt)
    ran = call("optimize", place / "net.pt", "-o", place / "interrupted", *INPUT, "--calib", "weights")
    assert ran.code == 130
    assert ran.message == "interrupted; nothing was written"
    assert listing(place) == before


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(("command", "fails"), [("optimize", True), ("optimize", False), ("analyze", True)])
def test_an_interrupt_that_compiled_code_swallows_ends_the_run_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str, fails: bool
) -> None:
    real = finding.find_sites

    def interrupted(*args: Any, **options: Any) -> Any:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if fails:
            raise TypeError("incompatible arguments. The following argument types are supported:")
        return real(*args, **options)

    before = listing(place)
    monkeypatch.setattr(finding, "find_sites", interrupted)
    words = ("-o", place / "interrupted", "--calib", "weights") if command == "optimize" else ()
    ran = call(command, place / "net.pt", *words, *INPUT)
    assert (ran.code, ran.message) == (130, "interrupted; nothing was written")
    assert listing(place) == before


@pytest.mark.usefixtures("untimed")
def test_a_failed_replacement_keeps_the_earlier_result(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(results, "render_html", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    ran = call("optimize", place / "net.pt", "-o", out, *INPUT, "--calib", "weights")
    assert ran.code == 2
    assert "disk full" in ran.message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_model_that_asks_for_float64_is_refused_before_the_long_work(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "rewrite", lambda *_args, **_options: pytest.fail("the model was fitted"))
    torch.save(small_network().double(), place / "double.pt")
    ran = call("optimize", place / "double.pt", "-o", place / "double", *INPUT, "--calib", "weights")
    (place / "double.pt").unlink()
    assert ran.code == 3
    assert "float64" in ran.message
    assert "model.float()" in ran.message
    assert "--no-onnx" in ran.message
    assert not (place / "double").exists()


def test_what_has_no_onnx_form_is_rewritten_without(place: Path, tmp_path: Path) -> None:
    torch.save(small_network().double(), tmp_path / "double.pt")
    call_without = ("--no-onnx", *INPUT, "--calib", "weights")
    ran = call("plan", tmp_path / "double.pt", "-o", tmp_path / "plan.json", *call_without, "--budget", "macs=0.6")
    assert ran.code == 0, ran.err
    ran = call("apply", tmp_path / "double.pt", tmp_path / "plan.json", "-o", tmp_path / "a", *call_without)
    assert ran.code == 0, ran.err
    assert "no ONNX file was asked for" in ran.said
    assert listing(tmp_path / "a") == set(FILES) - {"model.onnx"}
    both = ("--budget", "macs=0.6", "--rule", "balanced")
    assert call("optimize", tmp_path / "double.pt", "-o", tmp_path / "o", *call_without, *both).code == 0
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in "ao")
    assert first.keys() == second.keys() != small_network().state_dict().keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ran = call("optimize", place / "net.pt", "-o", tmp_path / "x", *call_without, "--budget", "latency=0.5")
    assert ran.code == 2
    assert "--no-onnx" in ran.message


def test_parity_holds_between_torch_and_onnx(out: Path) -> None:
    ran = call("verify", out / "model.pt", out / "model.onnx")
    assert ran.code == 0, ran.err
    assert "Parity holds." in ran.said


def test_verify_takes_a_folder_and_calibration_inputs(place: Path, out: Path) -> None:
    ran = call("verify", out, out / "model.onnx", "--calib", place / "images.npy")
    assert ran.code == 0, ran.err
    assert "on 80 calibration inputs" in ran.said


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_from_the_weights_alone_two_models_run_on_random_inputs(place: Path, out: Path, command: str) -> None:
    """As a project's file may say for every command."""
    rounds = ("--rounds", 3) if command == "bench" else ()
    ran = call(command, out / "model.onnx", out / "model.onnx", "--calib", "weights", *rounds)
    assert ran.code == 0, ran.err
    assert "8 random inputs" in ran.said or "input 1x3x16x16" in ran.said


def test_the_rewritten_model_is_not_the_original(place: Path, out: Path) -> None:
    by_default = call("verify", place / "net.pt", out / "model.pt", *INPUT)
    assert by_default.code == 0
    expected = call("verify", place / "net.pt", out / "model.pt", *INPUT, "--expect", "parity")
    assert expected.code == 1
    assert "output" in expected.message
    across = call("verify", place / "net.pt", out / "model.onnx", *INPUT, "--expect", "parity")
    assert across.code == 1


def test_a_rewritten_file_is_compared_by_its_fidelity(place: Path, out: Path) -> None:
    original, file = place / "net.pt", out / "model.onnx"
    for pair in ((original, file), (file, original)):
        ran = call("verify", *pair, *INPUT)
        assert ran.code == 0, ran.err
        assert f"made from {original}: it approximates it, fidelity is what counts" in ran.said
        assert "Parity holds" not in ran.said
    assert call("verify", original, out, *INPUT).code == 0
    for result in (out, out / "model.pt"):
        ran = call("verify", result, file, *INPUT)
        assert ran.code == 0, ran.err
        assert "Parity holds." in ran.said
    stranger = call("verify", place / "other.pt", file, *INPUT)
    assert stranger.code == 1
    assert "was rewritten from another model than" in stranger.message
    assert call("verify", place / "other.pt", file, *INPUT, "--expect", "fidelity").code == 0
    same = call("verify", file, file, *INPUT)
    assert (same.code, "are the same rewritten model" in same.said) == (0, True)


def test_verify_says_what_outputs_are_taken_for(place: Path, out: Path) -> None:
    ran = call("verify", place / "net.pt", out / "model.onnx", *INPUT, "--output", "output=values")
    assert ran.code == 0
    assert "output: taken for values: as asked" in ran.said
    refused = call("verify", place / "net.pt", out / "model.onnx", *INPUT, "--output", "x=values")
    assert (refused.code, "it has output" in refused.message) == (2, True)


def test_the_gates_of_verify(place: Path, out: Path) -> None:
    same, other = ("verify", place / "net.pt", place / "net.pt"), ("verify", place / "net.pt", place / "other.pt")
    inputs = ("--calib", place / "images.npy")
    assert call(*same, *inputs, "--agreement", "1", "--error", "0").code == 0
    disagreeing = call(*other, *inputs, "--agreement", "0.99")
    assert disagreeing.code == 1
    assert "top-1 agreement" in disagreeing.message
    assert "is below 0.99" in disagreeing.message
    far = call("verify", place / "net.pt", out / "model.onnx", *inputs, "--error", "0.0001")
    assert far.code == 1
    assert "relative error" in far.message
    assert "exceeds 0.0001" in far.message


def test_a_corrupted_factor_in_the_onnx_file_is_found(out: Path, tmp_path: Path) -> None:
    model = onnx.load(out / "model.onnx")
    factors = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert len(factors) >= 4
    weights = numpy_helper.to_array(factors[1]).copy()
    weights.flat[np.abs(weights).argmax()] *= -1  # one number of one factor
    factors[1].CopyFrom(numpy_helper.from_array(weights, factors[1].name))
    onnx.save(model, tmp_path / "corrupted.onnx")
    ran = call("verify", out / "model.pt", tmp_path / "corrupted.onnx", *INPUT)
    assert ran.code == 1
    assert "expected onnxruntime within 4.9e-04 of torch" in ran.message
    assert "do not deploy it" in ran.message


def test_corrupted_stored_weights_do_not_pass(out: Path, tmp_path: Path) -> None:
    for name in ("plan.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    state = load_file(tmp_path / "weights.safetensors")
    name = next(key for key, value in state.items() if value.dim() == 4 and value.shape[1] == 1)
    save_file({**state, name: state[name] + 0.1}, tmp_path / "weights.safetensors")
    sample = images(4)
    good = convrewrite.load(out, small_network())
    spoiled = convrewrite.load(tmp_path, small_network())
    assert isinstance(good, nn.Module)
    assert (good(sample) - spoiled(sample)).abs().max() > 1e-3
    del state[name]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(convrewrite.ConvRewriteError, match=name.replace(".", r"\.")):
        convrewrite.load(tmp_path, small_network())
    (tmp_path / "weights.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(convrewrite.ConvRewriteError, match=r"weights\.safetensors"):
        convrewrite.load(tmp_path, small_network())


def test_bench_compares_all_pairs(place: Path, out: Path) -> None:
    both_torch = call("bench", place / "net.pt", out / "model.pt", *INPUT, "--rounds", 3)
    assert both_torch.code == 0, both_torch.err
    assert {"onnxruntime", "torch"} <= set(both_torch.out.split())
    assert "input 1x3x16x16, 1 thread, median of 3 interleaved rounds" in both_torch.said
    mixed = call("bench", out / "model.onnx", out / "model.onnx", "--rounds", 3)
    assert mixed.code == 0, mixed.err
    assert "onnxruntime" in mixed.out.split()
    assert "torch" not in mixed.out.split()


def test_analyze_lists_every_site_with_its_reason(place: Path) -> None:
    ran = call("analyze", place / "net.pt", *INPUT, "--rule", "separable")
    assert ran.code == 0
    rows = [line.split()[:3] for line in ran.out.splitlines()]
    expected = [
        ["0", "standard", "3->16"],
        ["3", "standard", "16->32"],
        ["6", "standard", "32->32"],
        ["8", "pointwise", "32->16"],
    ]
    assert [row for row in expected if row not in rows] == []
    assert "it is the stem" in ran.said
    assert "kind is pointwise, the rule takes standard, dilated, transposed" in ran.said
    assert [line.split()[-1] for line in ran.out.splitlines()[2:6]] == ["[1]", "yes", "yes", "[2]"]


def test_rules_list_and_show() -> None:
    listed = call("rules", "list")
    assert listed.code == 0
    for name in ("asymmetric", "balanced", "grouped", "separable"):
        assert any(line.startswith(name) for line in listed.out.splitlines())
        shown = call("rules", "show", name)
        assert shown.code == 0
        assert "[[rule]]" in shown.out
        assert "schema = 1" in shown.said
        [rule] = load_rule_file(builtin_rules()[name]).rule
        words = " ".join(shown.out.replace("#", "").split())
        asked = "Without a budget, or --keep, the ratio below holds at every site"
        assert f"{asked}: at most {rule.ratio} of its own MACs." in words


def test_rules_check(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    head = 'schema = 1\n[[rule]]\nname = "mine"\nstructures = ["separable"]\nmatch = { kind = ["standard"] }\n'
    file.write_text(head + "[[rule.accepts]]\nconv = { in_channels = 64, out_channels = 64, kernel_size = [3, 3] }\n")
    good = call("rules", "check", file)
    assert good.code == 0
    assert "mine.toml: valid; 1 example holds" in good.said
    file.write_text(head + "[[rule.accepts]]\nconv = { in_channels = 64, out_channels = 64, kernel_size = [1, 1] }\n")
    failing = call("rules", "check", file)
    assert failing.code == 1
    assert "FAIL mine: accepts[0]: kind is pointwise, the rule takes standard" in failing.said
    assert "1 of 1 checks fail" in failing.message
    file.write_text(head + "parameters = { separable = { order = ['nosuch'], nokey = [1] } }\n")
    unknown = call("rules", "check", file)
    assert unknown.code == 1
    order = "FAIL mine: parameters.separable.order: expected one of depthwise-first, pointwise-first, found 'nosuch'"
    key = "FAIL mine: parameters.separable.nokey: expected order or rank, found nokey, which separable does not have"
    assert all(line in unknown.said for line in (order, key))


def test_help_and_json_are_readable(out: Path) -> None:
    assert call("--help").code == 0
    assert call("optimize", "--help").code == 0
    report = json.loads((out / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["model"].endswith("net.pt")


@pytest.mark.usefixtures("untimed")
def test_an_interrupt_as_a_command_is_done_says_that_its_result_stands(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last moment at which a signal is heard."""

    def late() -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(interrupts, "ignored_from_here", late)
    ran = call("optimize", place / "net.pt", "-o", tmp_path / "out", *INPUT, "--calib", "weights", "--no-onnx")
    assert (ran.code, ran.message) == (130, f"interrupted; {tmp_path / 'out'} holds the new result, whole")
