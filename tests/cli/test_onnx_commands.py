"""The commands with ONNX files: every one of them takes a graph, with inputs by name."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from clocks import FalseTimer, in_place_of_this_machine
from commands import Ran, call, images, listing, small_network
from onnx_texts import CLASSIFIER, CLASSIFIER_SHAPES, classifier, drawn, graph, noise
from PIL import Image

from convrewrite.reporting.report import Report
from convrewrite.results.folder import FILES

SAVED = set(FILES) - {"model.pt", "weights.safetensors"}

PLANNED = ("--budget", "macs=0.6", "--fast")

PAIR = CLASSIFIER.replace("image)", "image, float[N, 10] prior)", 1).replace("logits = Gemm", "g1 = Gemm", 1)
PAIR = PAIR.rstrip().removesuffix("}") + "    logits = Add(g1, prior)\n}\n"
"""A second input, which is added to the logits."""

LAST = CLASSIFIER.replace("float[N, 3, 16, 16] image)", "float[N, 20, 16, 3] image)").replace(
    "a = Conv<pads = [1, 1, 1, 1]>(image,",
    "turned = Transpose<perm = [0, 3, 1, 2]>(image) a = Conv<pads = [1, 1, 1, 1]>(turned,",
)  # fmt: skip
"""Images (N, H, W, C), 20 high and 16 wide."""


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_this_machine(monkeypatch, FalseTimer(0.5, file_seconds=1e-9 * 995648))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    onnx.save(classifier(), str(folder / "net.onnx"))
    onnx.save(graph(PAIR, CLASSIFIER_SHAPES), str(folder / "pair.onnx"))
    onnx.save(graph(LAST, CLASSIFIER_SHAPES), str(folder / "last.onnx"))
    free = CLASSIFIER.replace("[N, 3, 16, 16]", "[N, 3, H, W]")
    onnx.save(graph(free, CLASSIFIER_SHAPES), str(folder / "free.onnx"))
    np.save(folder / "images.npy", images().numpy())
    (folder / "pictures").mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def planned(place: Path) -> Ran:
    with pytest.MonkeyPatch.context() as patch:
        in_place_of_this_machine(patch, FalseTimer())
        return call("plan", place / "net.onnx", "-o", place / "plan.json", *PLANNED, "--calib", place / "images.npy")


@pytest.fixture(scope="module")
def out(place: Path, planned: Ran) -> Path:
    """What ``apply`` leaves."""
    assert planned.code == 0, planned.err
    with pytest.MonkeyPatch.context() as patch:
        in_place_of_this_machine(patch, FalseTimer(0.5))
        ran = call(
            "apply", place / "net.onnx", place / "plan.json", "-o", place / "out", "--calib", place / "images.npy"
        )
    assert ran.code == 0, ran.err
    return place / "out"


def report_of(folder: Path) -> Report:
    return Report.model_validate_json((folder / "report.json").read_text())


def test_optimize_takes_a_graph(place: Path, tmp_path: Path) -> None:
    ran = call("optimize", place / "net.onnx", "-o", tmp_path / "out", "--calib", place / "images.npy")
    assert ran.code == 0, ran.err
    assert listing(tmp_path / "out") == SAVED
    assert "2 of 3 convolution sites rewritten" in ran.said
    assert f"Written to {tmp_path / 'out'}: model.onnx, plan.json" in ran.said
    report = report_of(tmp_path / "out")
    assert (report.input_shapes, report.calibration.fitted_on) == (((1, 3, 16, 16),), 64)
    assert report.model == str(place / "net.onnx")


def test_plan_shows_and_apply_carries_out(place: Path, planned: Ran, out: Path) -> None:
    assert f"Written to {place / 'plan.json'}" in planned.said
    assert listing(out) == SAVED
    totals = report_of(out).totals
    assert totals.macs.after <= 0.6 * totals.macs.before


def test_explain_tells_of_a_site(out: Path) -> None:
    ran = call("explain", out, "second")
    assert ran.code == 0, ran.err
    assert "second" in ran.out
    assert call("explain", out).code == 0


def test_analyze_lists_the_convolutions(place: Path) -> None:
    ran = call("analyze", place / "net.onnx", "--rule", "separable")
    assert ran.code == 0, ran.err
    rows = [line.split()[:3] for line in ran.out.splitlines()]
    for row in (["stem", "standard", "3->16"], ["first", "standard", "16->32"], ["second", "standard", "32->32"]):
        assert row in rows


def test_verify_compares_the_result_with_the_original(place: Path, out: Path) -> None:
    for second in (out, out / "model.onnx"):
        ran = call("verify", place / "net.onnx", second)
        assert ran.code == 0, ran.err
        assert "fidelity is what counts" in ran.said
    ran = call("verify", place / "net.onnx", out / "model.onnx", "--calib", place / "images.npy", "--error", "0.0001")
    assert ran.code == 1
    assert "exceeds 0.0001" in ran.message
    assert call("verify", place / "net.onnx", place / "net.onnx", "--expect", "parity").code == 0
    assert call("verify", place / "net.onnx", out, "--expect", "parity").code == 1
    ran = call("verify", place / "net.onnx", out, "--factory", "nothere.py:x")
    assert ran.code == 2 and ran.message.startswith("--factory: expected a PyTorch model that it builds, found none in")


def test_verify_knows_the_file_a_result_was_made_from(place: Path, out: Path, tmp_path: Path) -> None:
    assert f"made from {place / 'net.onnx'}" in " ".join(call("verify", place / "net.onnx", out).out.split())
    other = onnx.load(str(place / "net.onnx"))
    other.doc_string = "another one"
    onnx.save(other, str(tmp_path / "other.onnx"))
    ran = call("verify", tmp_path / "other.onnx", out)
    assert ran.code == 1
    assert "was rewritten from another model than" in ran.message
    assert call("verify", tmp_path / "other.onnx", out, "--expect", "fidelity").code == 0


def test_bench_times_the_files(place: Path, out: Path) -> None:
    ran = call("bench", place / "net.onnx", out, "--rounds", 3)
    assert ran.code == 0, ran.err
    assert "onnxruntime" in ran.out.split()
    assert "input 1x3x16x16, 1 thread, median of 3 interleaved rounds" in ran.said


@pytest.mark.parametrize("given", [
    ("--input", "prior=1x10", "--input", "image=1x3x16x16"), ("--input", "1x3x16x16", "--input", "1x10"),
    ("--input", "image=1x3x16x16"), (),
])  # fmt: skip
def test_inputs_go_by_name_or_in_order(place: Path, given: tuple[str, ...]) -> None:
    ran = call("analyze", place / "pair.onnx", "--rule", "separable", *given)
    assert ran.code == 0, ran.err
    assert "second" in ran.out


@pytest.mark.parametrize(("given", "words"), [
    (("--input", "picture=1x3x16x16"), "expected names of inputs (image, prior), found 'picture'"),
    (("--input", "1x3x16x16"), "expected 2 shapes, in the order of the inputs image, prior, or shapes by name"),
    (("--input", "1x3x16x16", "--input", "prior=1x10"), "expected 2 shapes, in the order of the inputs image, prior"),
    (("--input", "image=1x3x16x16", "--input", "image=1x3x16x16"), "expected every input once"),
    (("--input", "image=1x3x16"), "input 'image': expected shape"),
    (("--input", "image=1x3x0x16"), "input shape '1x3x0x16': expected positive integers"),
    (("--input", "image=banana"), "banana"),
    (("--factory", "torchvision:resnet18"), "--factory: expected with a file of weights, but"),
])  # fmt: skip
def test_inputs_that_the_graph_does_not_have_are_told(place: Path, given: tuple[str, ...], words: str) -> None:
    ran = call("analyze", place / "pair.onnx", *given)
    assert ran.code in (2, 3), ran.out
    assert words in ran.message


def test_the_size_of_free_axes_is_taken_from_the_calibration_inputs(place: Path, tmp_path: Path) -> None:
    ran = call("optimize", place / "free.onnx", "-o", tmp_path / "out", "--calib", place / "images.npy", "--no-onnx")
    assert ran.code == 0, ran.err
    assert report_of(tmp_path / "out").input_shapes == ((1, 3, 16, 16),)
    assert not any("example size" in note for note in report_of(tmp_path / "out").notes)
    alone = call("analyze", place / "free.onnx")
    assert "free axes of inputs got an example size: image as 1x3x224x224" in alone.said


def test_calibration_inputs_go_by_the_names_of_the_graph(place: Path, tmp_path: Path) -> None:
    data = {"prior": noise(80, 10).numpy(), "image": images().numpy(), "label": np.zeros(80, np.int64)}
    np.savez(tmp_path / "inputs.npz", **data)  # type: ignore[arg-type]
    ran = call("optimize", place / "pair.onnx", "-o", tmp_path / "out", "--calib", tmp_path / "inputs.npz")
    assert ran.code == 0, ran.err
    report = report_of(tmp_path / "out")
    assert report.input_shapes == ((1, 3, 16, 16), (1, 10))
    assert report.calibration.fitted_on == 64
    np.savez(tmp_path / "strange.npz", picture=images().numpy(), prior=noise(80, 10).numpy())
    ran = call("optimize", place / "pair.onnx", "-o", tmp_path / "no", "--calib", tmp_path / "strange.npz")
    assert ran.code == 2
    assert "image" in ran.message
    assert not (tmp_path / "no").exists()


def test_images_are_given_as_the_graph_has_its_axes(place: Path, tmp_path: Path) -> None:
    normalised = ("--mean", "0.5,0.5,0.4", "--std", "0.2,0.2,0.3")
    for name, shape in (("net.onnx", (1, 3, 16, 16)), ("last.onnx", (1, 20, 16, 3))):
        ran = call("optimize", place / name, "-o", tmp_path / name, "--calib", place / "pictures", *normalised)
        assert ran.code == 0, ran.err
        report = report_of(tmp_path / name)
        assert report.input_shapes == (shape,)
        assert report.calibration.fitted_on == 16


def test_mean_and_deviation_count_channels_where_they_are(place: Path, tmp_path: Path) -> None:
    ran = call(
        "optimize", place / "last.onnx", "-o", tmp_path / "out", "--calib", place / "pictures", "--mean", "0.5,0.5"
    )
    assert ran.code == 2
    assert "mean" in ran.message


def test_two_files_take_calibration_inputs_as_they_have_their_axes(place: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "last.npz", image=noise(12, 20, 16, 3).numpy())
    for command in (("verify",), ("bench", "--rounds", 3)):
        ran = call(*command, place / "last.onnx", place / "last.onnx", "--calib", tmp_path / "last.npz")
        assert ran.code == 0, ran.err
    assert "input 1x20x16x3" in ran.said


def test_two_files_of_one_example_take_many_one_by_one(place: Path, tmp_path: Path) -> None:
    for count in (1, 5):
        text = CLASSIFIER.replace("[N,", f"[{count},")
        onnx.save(graph(text, CLASSIFIER_SHAPES), str(tmp_path / f"{count}.onnx"))
    np.save(tmp_path / "images.npy", images()[:12].numpy())
    ran = call("verify", tmp_path / "1.onnx", tmp_path / "1.onnx", "--calib", tmp_path / "images.npy")
    assert ran.code == 0, ran.err
    assert "on 12 calibration inputs" in ran.said
    ran = call("verify", tmp_path / "5.onnx", tmp_path / "5.onnx", "--calib", tmp_path / "images.npy")
    assert ran.code == 0, ran.err
    assert "on 10 calibration inputs" in ran.said and "last 2 inputs were left out" in ran.said
    ran = call("bench", tmp_path / "5.onnx", place / "net.onnx", "--calib", tmp_path / "images.npy", "--rounds", 3)
    assert ran.code == 0, ran.err
    assert "input 5x3x16x16" in ran.said
    np.save(tmp_path / "few.npy", images()[:3].numpy())
    ran = call("verify", tmp_path / "5.onnx", tmp_path / "5.onnx", "--calib", tmp_path / "few.npy")
    assert (ran.code, "expected at least 5" in ran.message) == (2, True)


def test_two_files_hold_inputs_without_an_axis_of_examples(tmp_path: Path) -> None:
    text = CLASSIFIER.replace("image)", "image, float[16] shift, int64 rate)", 1).replace("stem_bias", "shift")
    shapes = {name: shape for name, shape in CLASSIFIER_SHAPES.items() if name != "stem_bias"}
    path = tmp_path / "held.onnx"
    onnx.save(graph(text, shapes), str(path))
    np.savez(tmp_path / "inputs.npz", image=images()[:12].numpy(), shift=np.ones(16, np.float32), rate=np.array(2))
    (tmp_path / "example.py").write_text(
        "import torch\nSHIFT = {'image': torch.zeros(2, 3, 16, 16), 'shift': torch.ones(16), 'rate': torch.tensor(3)}\n"
    )
    for more in (("--calib", tmp_path / "inputs.npz"), ("--input", f"{tmp_path / 'example.py'}:SHIFT")):
        ran = call("verify", path, path, *more)
        assert ran.code == 0, ran.err
        assert "inputs without an axis of examples stay as in the example input: shift, rate" in ran.said
    assert call("bench", path, path, "--rounds", 3).code == 0
    ran = call("optimize", path, "--calib", tmp_path / "inputs.npz", "--no-onnx", "--fast", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err


def test_a_graph_that_is_not_measured(place: Path, tmp_path: Path) -> None:
    ran = call("optimize", place / "net.onnx", "-o", tmp_path / "out", "--calib", "weights", "--no-onnx")
    assert ran.code == 0, ran.err
    assert listing(tmp_path / "out") == SAVED
    assert "the ONNX file was neither timed nor compared" in ran.said and "no ONNX file" not in ran.said


def test_the_place_of_the_original_is_not_taken(place: Path, tmp_path: Path) -> None:
    onnx.save(classifier(), str(tmp_path / "model.onnx"))
    before = (tmp_path / "model.onnx").read_bytes()
    ran = call("optimize", tmp_path / "model.onnx", "-o", tmp_path, "--calib", "weights")
    assert ran.code == 2
    assert (tmp_path / "model.onnx").read_bytes() == before


def test_files_that_cannot_be_used(place: Path, tmp_path: Path) -> None:
    missing = call("optimize", tmp_path / "nothing.onnx", "-o", tmp_path / "out")
    assert (missing.code, "no such file" in missing.message) == (3, True)
    (tmp_path / "text.ONNX").write_text("no model")
    broken = call("analyze", tmp_path / "text.ONNX")
    assert (broken.code, "export it again" in broken.message) == (3, True)
    model = graph("(float[N, 3, 16, 16] x) => (float[N, 3, 16, 16] y) { y = own.Thing(x) }")
    onnx.save(model, str(tmp_path / "custom.onnx"))
    custom = call("analyze", tmp_path / "custom.onnx")
    assert (custom.code, "pass --trust" in custom.message) == (3, True)
    trusted = call("analyze", tmp_path / "custom.onnx", "--trust")
    assert (trusted.code, "pass --trust" in trusted.message) == (3, False)


def test_names_of_a_graph_do_nothing_to_the_terminal(tmp_path: Path) -> None:
    model: Any = classifier()
    model.graph.input[0].name = "\x1b[31mimage"
    model.graph.node[0].input[0] = "\x1b[31mimage"
    onnx.save(model, str(tmp_path / "net.onnx"))
    ran = call("analyze", tmp_path / "net.onnx", "--input", "picture=1x3x16x16")
    assert ran.code == 2
    assert "\\x1b[31mimage" in ran.message


def test_a_torch_model_takes_inputs_by_name_too(tmp_path: Path) -> None:
    torch.save(small_network(), tmp_path / "net.pt")
    assert call("analyze", tmp_path / "net.pt", "--input", "input=1x3x16x16").code == 0
    ran = call("analyze", tmp_path / "net.pt", "--input", "picture=1x3x16x16")
    assert ran.code == 2
    assert "expected names of inputs (input), found 'picture'" in ran.message


def test_int8_of_a_model_in_half_precision_is_refused_before_any_work(tmp_path: Path) -> None:
    weights = {name: drawn(shape, seed, np.float16) for seed, (name, shape) in enumerate(CLASSIFIER_SHAPES.items())}
    onnx.save(graph(CLASSIFIER.replace("float[", "float16["), weights), str(tmp_path / "half.onnx"))
    np.save(tmp_path / "images.npy", images()[:12].numpy())
    words = ("--int8", "--any-speed", "--calib", tmp_path / "images.npy", "-o", tmp_path / "out")
    ran = call("optimize", tmp_path / "half.onnx", *words)
    assert ran.code == 2, ran.err
    assert (
        "--int8: expected a model in float32, which alone can be quantised, found one in half precision" in ran.message
    )
    assert not (tmp_path / "out").exists()
