"""End to end on the trained example: the command line, the files it leaves, and what they compute."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Ran, call, listing
from safetensors.torch import load_file
from torch import Tensor, nn

import convrewrite
from convrewrite.loading.files import load_model
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.reporting.report import Report
from convrewrite.results.folder import FILES
from convrewrite.tables import WIDTH

FASHION = Path(__file__).parents[2] / "examples" / "fashion"
MODEL = (FASHION / "fashion.pt", "--factory", f"{FASHION / 'model.py'}:fashion_resnet")

pytestmark = pytest.mark.slow

FITTED, HELD_OUT = 192, 48
"""Of the calibration images: enough that accuracy stays as with all, which take the most time of a fit."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fashion")


@pytest.fixture(scope="module")
def ran(place: Path) -> Ran:
    calib = ("--calib", first_images(place, FITTED + HELD_OUT))
    return call("optimize", *MODEL, "--rule", "separable", *calib, "-o", place / "out")


@pytest.fixture(scope="module")
def out(ran: Ran, place: Path) -> Path:
    assert ran.code == 0, ran.err
    return place / "out"


@pytest.fixture(scope="module")
def report(out: Path) -> Report:
    return Report.model_validate_json((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return load_model(MODEL[0], factory=str(MODEL[2])).model


@pytest.fixture(scope="module")
def rewritten(out: Path) -> nn.Module:
    return load_model(out / "model.pt", factory=str(MODEL[2])).model


@pytest.fixture(scope="module")
def examples() -> tuple[Tensor, Tensor]:
    with np.load(FASHION / "test.npz") as arrays:
        return torch.from_numpy(arrays["images"]).float() / 255, torch.from_numpy(arrays["labels"])


@pytest.fixture(scope="module")
def few(place: Path) -> Path:
    """Calibration images where a few do."""
    return first_images(place, 96)


@pytest.fixture(scope="module")
def verified(out: Path, few: Path) -> Ran:
    """The result beside what it was made from."""
    options = ("--calib", few, "--agreement", "0.9", "--error", "0.2")
    return call("verify", MODEL[0], out, *MODEL[1:], *options)


def first_images(place: Path, count: int) -> Path:
    """A file of the first calibration images."""
    (place / "inputs").mkdir(exist_ok=True)
    path = place / "inputs" / f"{count}.npz"
    with np.load(FASHION / "calibration.npz") as arrays:
        np.savez(path, images=arrays["images"][:count])
    return path


@torch.no_grad()
def classes(model: nn.Module | OnnxModel, images: Tensor) -> Tensor:
    scores = [model(batch) for batch in images.split(100)]
    return torch.cat([score["output"] if isinstance(score, dict) else score for score in scores]).argmax(1)


def test_all_files_are_there_and_nothing_else(out: Path, place: Path) -> None:
    assert listing(out) == set(FILES)
    assert {path.name for path in place.iterdir()} <= {"out", "inputs"}


def test_the_report_says_what_was_saved(report: Report, ran: Ran) -> None:
    assert report.totals.macs.ratio < 0.40
    assert report.totals.parameters.ratio < 0.40
    assert report.totals.file_bytes is not None
    assert report.totals.file_bytes.ratio < 0.8
    assert report.totals.onnx_latency_seconds is not None
    assert len(report.sites) == 21
    assert sum(site.action == "rewritten" for site in report.sites) == 18
    assert {site.error_basis for site in report.sites if site.action == "rewritten"} == {"held-out inputs"}
    assert (report.calibration.fitted_on, report.calibration.held_out) == (FITTED, HELD_OUT)
    assert "18 of 21 convolution sites rewritten" in ran.said


def test_the_totals_are_those_of_the_models(report: Report, original: nn.Module, rewritten: nn.Module) -> None:
    for model, expected in (
        (original, report.totals.parameters.before),
        (rewritten, report.totals.parameters.after),
    ):
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_parity_and_fidelity_are_reported(report: Report) -> None:
    assert [row.passed for row in report.parity] == [True]
    (row,) = report.fidelity
    assert row.top1_agreement is not None
    assert row.top1_agreement > 0.95
    assert row.relative_error < 0.2
    assert report.fidelity_basis == f"measured on {HELD_OUT} held-out calibration inputs"


def test_accuracy_stays_and_onnx_decides_as_torch_does(
    out: Path, original: nn.Module, rewritten: nn.Module, examples: tuple[Tensor, Tensor]
) -> None:
    images, labels = examples
    before, after = classes(original, images), classes(rewritten, images)
    top1 = [float((decided == labels).float().mean()) for decided in (before, after)]
    assert top1[0] > 0.925
    assert top1[1] >= top1[0] - 0.02
    in_onnx = classes(OnnxModel(out / "model.onnx"), images)
    assert int((in_onnx != after).sum()) <= 2  # near-ties


def test_the_stored_parts_give_the_pickled_model(
    out: Path, original: nn.Module, rewritten: nn.Module, examples: tuple[Tensor, Tensor]
) -> None:
    loaded = convrewrite.load(out, original)
    sample = examples[0][:200]
    with torch.no_grad():
        assert torch.equal(loaded(sample), rewritten(sample))
    assert set(load_file(out / "weights.safetensors")) == set(rewritten.state_dict())


def test_the_verify_command_agrees(out: Path, few: Path, verified: Ran) -> None:
    factory, calib = MODEL[1:], ("--calib", few)
    assert call("verify", out, out / "model.onnx", *factory, *calib).code == 0
    assert verified.code == 0
    failing = call("verify", MODEL[0], out, *factory, *calib, "--expect", "parity")
    assert failing.code == 1
    assert failing.message


def test_what_commands_print_fits_a_terminal_of_80_columns(ran: Ran, verified: Ran, out: Path, place: Path) -> None:
    factory, calib = MODEL[1:], ("--calib", first_images(place, 24))
    said = [
        ran,
        call("analyze", *MODEL, "--rule", "balanced"),
        call("report", out),
        call("explain", out),
        call("explain", out, "stage3.2.conv2"),
        call("compare", out, out),
        verified,
        call("bench", out / "model.onnx", out / "model.onnx", "--rounds", "3"),
        call("quantise", out, *factory, *calib),
        call("export", out, "--to", "half", *factory, *calib),
        call("rules", "list"),
        call("rules", "check", FASHION.parents[1] / "rules" / "balanced.toml"),
        call("schema"),
    ]
    for one in said:
        assert one.code == 0 and one.out, one.err
        assert max(map(len, one.out.splitlines())) <= WIDTH, one.out


def test_two_runs_are_byte_equal(place: Path) -> None:
    few = first_images(place, 24)
    rule = place / "inputs" / "some.toml"
    text = 'schema = 1\n[[rule]]\nname = "some"\nmatch = { name = "stage1.2.*" }\nstructures = ["separable"]\n'
    rule.write_text(text, encoding="utf-8")
    model, example = load_model(MODEL[0], factory=str(MODEL[2])).model, torch.zeros(1, 1, 28, 28)
    folders = [place / "inputs" / "first", place / "inputs" / "second"]
    for folder in folders:
        made = convrewrite.optimize(model, example, [rule], str(few), measure=False)
        made.save(folder)
    for name in ("weights.safetensors", "plan.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
