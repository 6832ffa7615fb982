"""The example scripts, run from another folder as a user would."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from scripts import Scripts

from convrewrite.reporting.report import Report

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"

Run = Callable[..., str]
"""A script and its arguments: what it prints."""


@pytest.fixture
def run(scripts: Scripts, tmp_path: Path) -> Run:
    """An example, from an empty folder."""

    def run(script: str, *arguments: object) -> str:
        ran = scripts.run(EXAMPLES / script, *arguments, folder=tmp_path)
        assert ran.code == 0, ran.err
        assert "Warning" not in ran.err
        return ran.out

    return run


def numbers(text: str) -> dict[str, float]:
    """``name value`` on every line."""
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def test_the_pipeline(run: Run, tmp_path: Path) -> None:
    found = numbers(run("pipeline_api.py", "results"))
    assert 0.7 < found["macs"] <= 0.8
    assert found["agreement"] >= 0.95
    assert found["agreement_after_loading"] == 1
    assert found["int8_size"] < 0.6
    results = tmp_path / "results"
    assert (results / "rewritten" / "report.json").is_file()
    session = onnxruntime.InferenceSession(results / "int8.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"input": torch.zeros(2, 1, 28, 28).numpy()})
    assert scores.shape == (2, 10)


def test_the_rule_and_the_structure(run: Run, tmp_path: Path) -> None:
    found = numbers(run("own_rule_and_structure.py"))
    assert found["examples"] == 2
    assert found["sites"] == 5
    assert found["macs"] < 0.9
    assert found["agreement"] >= 0.95
    assert list(tmp_path.iterdir()) == [], "the script wrote to the working folder"


def test_the_passes(run: Run, tmp_path: Path) -> None:
    before, between, after = run("fx_passes.py", "state.pt").splitlines()
    assert "21 BatchNorm2d, 21 Conv2d" in before
    assert "7 Sequential" in between
    assert "14 Identity" in between
    assert "Identity" not in after
    assert "7 Sequential" in after
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert "stage3.0.conv1.0.weight" in state


def test_the_segmentation_network_keeps_both_outputs(run: Run, tmp_path: Path) -> None:
    found = numbers(run("segmentation/run.py", "results"))
    assert found["macs"] < 0.55
    assert found["iou_before"] > 0.6
    assert found["iou_after"] > found["iou_before"] - 0.05
    assert found["pixels_after"] > found["pixels_before"] - 0.01
    assert found["output.mask:error"] < 0.1
    assert found["output.largest:agreement"] > 0.9
    assert max(found["output.mask:onnx"], found["output.largest:onnx"]) < 5e-4
    report = Report.model_validate_json((tmp_path / "results" / "report.json").read_text())
    assert {"dilated", "transposed"} <= {site.kind for site in report.sites if site.action == "rewritten"}
    session = onnxruntime.InferenceSession(tmp_path / "results" / "model.onnx", providers=["CPUExecutionProvider"])
    mask, largest = session.run(["output.mask", "output.largest"], {"input": torch.zeros(3, 1, 32, 32).numpy()})
    assert (mask.shape, largest.shape) == ((3, 4, 32, 32), (3, 3))


def test_the_super_resolution_network_keeps_its_decibels(run: Run, tmp_path: Path) -> None:
    found = numbers(run("super_resolution/run.py"))
    assert found["macs"] < 0.6
    assert found["psnr_before"] > found["psnr_bilinear"] + 1
    assert found["psnr_after"] > found["psnr_before"] - 0.3
    assert found["output:error"] < 0.05
    assert found["output:onnx"] < 5e-4
    assert list(tmp_path.iterdir()) == [], "the script wrote to the working folder"


def test_the_structure_is_exact_at_full_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from own_rule_and_structure import InputChannel

    from convrewrite.conv import ConvSpec
    from convrewrite.structures.algebra import compose

    structure, generator = InputChannel(), torch.Generator().manual_seed(0)
    for inputs, outputs in ((12, 5), (3, 20)):
        spec = ConvSpec(inputs, outputs, (3, 2))
        kernel = torch.randn(spec.kernel_shape, generator=generator, dtype=torch.float64)
        setting = {"rank": structure.full_rank(spec, {})}
        composed = compose(structure.weights(kernel, spec, setting), structure.stages(spec, setting))
        assert torch.allclose(composed, kernel, atol=1e-12)
        less = {"rank": setting["rank"] - 1}
        truncated = compose(structure.weights(kernel, spec, less), structure.stages(spec, less))
        assert not torch.allclose(truncated, kernel, atol=1e-2)


def test_the_readme_names_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    own = {"README.md", "__pycache__"}
    assert [path.name for path in EXAMPLES.iterdir() if path.name not in text and path.name not in own] == []


def test_the_detector(scripts: Scripts, tmp_path: Path) -> None:
    """The trained checkpoint, as its page has it but for the calibration, 24 images, for the sites, which are those of two
    blocks, for a budget of MACs, and without timing."""
    folder = EXAMPLES / "detection"
    images = f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom shapes import draw\nFEW = draw(24, seed=2)[0]\n"
    (tmp_path / "few.py").write_text(images, encoding="utf-8")
    rule = "name = 'two'\nstructures = ['asymmetric']\nmatch = {name = 'model\\.[24]\\..*'}\nratio = 0.5\n"
    (tmp_path / "two.toml").write_text(f"schema = 1\n[[rule]]\n{rule}", encoding="utf-8")
    words = ["optimize", folder / "best.pt", "--factory", f"{folder / 'model.py'}:detector", "--input", "1x3x96x96"]
    words += [
        "--calib",
        "few.py:FEW",
        "--rule",
        "two.toml",
        "--budget",
        "macs=0.95",
        "--fast",
        "--any-speed",
        "-o",
        "out",
    ]
    ran = scripts.run("convrewrite", *words, "--no-onnx", folder=tmp_path)
    assert ran.code == 0, ran.err
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.totals.macs.ratio <= 0.95
    assert report.fidelity[0].relative_error <= 0.02
    without = (
        "import sys; sys.modules['convrewrite'] = None; sys.argv = ['evaluate.py', 'out']; sys.path.insert(0, {!r})\n"
    )
    judged = "import evaluate; images, boxes = evaluate.draw(60, seed=3); from pathlib import Path\n"
    judged += "for one in (evaluate.trained(), evaluate.predictor(Path('out'))):\n"
    judged += "    print(evaluate.mean_average_precision(one, images, boxes))"
    ran = subprocess.run(
        [sys.executable, "-c", without.format(str(folder)) + judged],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    before, after = map(float, ran.stdout.split())
    assert before > 0.9
    assert after > before - 0.02
