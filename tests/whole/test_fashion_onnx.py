"""End to end on the trained example as an ONNX file: exported, rewritten, evaluated, as the README has it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import call, listing
from scripts import Scripts

from convrewrite.reporting.report import Report
from convrewrite.results.folder import FILES

FASHION = Path(__file__).parents[2] / "examples" / "fashion"

pytestmark = pytest.mark.slow


def said(scripts: Scripts, name: str, *arguments: object) -> str:
    ran = scripts.run(FASHION / name, *arguments, folder=FASHION.parents[1])
    assert ran.code == 0, ran.err
    return ran.out


@pytest.fixture(scope="module")
def place(scripts: Scripts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    assert "bytes" in said(scripts, "export.py", folder / "fashion.onnx")
    with np.load(FASHION / "calibration.npz") as arrays:
        np.savez(folder / "few.npz", images=arrays["images"][:64])
    return folder


def test_the_trained_example_as_a_graph(place: Path) -> None:
    ran = call(
        "optimize", place / "fashion.onnx", "--rule", "separable", "--calib", place / "few.npz", "-o", place / "out"
    )
    assert ran.code == 0, ran.err
    assert listing(place / "out") == set(FILES) - {"model.pt", "weights.safetensors"}
    report = Report.model_validate_json((place / "out" / "report.json").read_text(encoding="utf-8"))
    assert sum(site.action == "rewritten" for site in report.sites) == 18
    assert report.totals.macs.ratio < 0.4
    [row] = report.fidelity
    assert row.top1_agreement is not None
    assert row.top1_agreement > 0.9
    assert [parity.passed for parity in report.parity] == [True]
    before, after = onnx.load(str(place / "fashion.onnx")), onnx.load(str(place / "out" / "model.onnx"))
    kept = [node.SerializeToString() for node in after.graph.node]
    assert all(node.SerializeToString() in kept for node in before.graph.node if node.op_type != "Conv")
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)


def test_the_images_are_still_told_apart(scripts: Scripts, place: Path) -> None:
    lines = said(
        scripts, "evaluate.py", place / "fashion.onnx", place / "out", place / "out" / "model.onnx"
    ).splitlines()
    original, folder, file = (float(line.split(": ")[1].split("%")[0]) for line in lines)
    assert original > 93
    assert folder == file > original - 3
