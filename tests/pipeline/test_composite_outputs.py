"""Models that return more than one tensor go the whole way: fidelity and parity for each output, under its name."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import FalseTimer
from commands import call
from torch import Tensor, nn

from convrewrite import optimize
from convrewrite.calibration.batches import read_calibration
from convrewrite.graph.tracing import trace
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.reporting.html import render_html
from convrewrite.reporting.markdown import render_markdown
from convrewrite.reporting.text import render_text
from convrewrite.results.folder import Result
from convrewrite.runtime.onnx_export import export
from convrewrite.runtime.parity import check_parity

Pair = namedtuple("Pair", "mask rest")


class DictOutput(OrderedDict[str, Any]):
    """Dictionary and dataclass at once, as the outputs of the transformers library are."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value


@dataclass
class Segmented(DictOutput):
    mask: Tensor | None = None
    loss: Tensor | None = None
    features: tuple[Tensor, ...] | None = None


@dataclass
class Plain:
    mask: Tensor
    features: tuple[Tensor, ...]
    loss: Tensor | None = None
    scale: float = 0.5


class Net(nn.Module):
    """(N, 3, 12, 12) -> mask logits (N, 2, 12, 12) and features, in the container that ``pack`` makes."""

    def __init__(self, pack: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 2, 1)
        self.pack = pack
        self.eval()

    def forward(self, x: Tensor) -> object:
        features = torch.relu(self.conv(torch.relu(self.stem(x))))
        return self.pack(self.head(features), features)


def everything(mask: Tensor, features: Tensor) -> dict[str, object]:
    return {
        "mask": mask, "classes": mask.argmax(1), "on": mask[:, 1] > 0, "scores": mask.mean((2, 3)),
        "aux": [features, (None, features * 2)], "level": mask.mean(), "name": "net", "threshold": 0.5,
    }  # fmt: skip


EVERYTHING = ["mask", "classes", "on", "scores", "aux.0", "aux.1.1", "level"]


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("pack", "names"),
    [
        (lambda mask, features: (mask, [features, {"more": -features}]), ["0", "1.0", "1.1.more"]),
        (lambda mask, features: Plain(mask, (features, -features)), ["mask", "features.0", "features.1"]),
        (lambda mask, features: Segmented(mask=mask, features=(features,)), ["mask", "features.0"]),
        (lambda mask, features: Pair(mask, {"b": features, "a": mask.sum()}), ["mask", "rest.b", "rest.a"]),
        (lambda mask, features: {"twice": mask, "again": mask, "steps": torch.arange(3)}, ["twice", "again", "steps"]),
    ],
    ids=["nested", "dataclass", "dictionary and dataclass", "named tuple", "twice the same"],
)
def test_every_container_is_followed_and_exported_with_parity(
    pack: Callable[[Tensor, Tensor], object], names: list[str], tmp_path: Path
) -> None:
    model = Net(pack)
    assert trace(model).whole is not None
    exported = export(model, images(1), tmp_path / "model.onnx")
    assert exported.dynamic_batch
    assert OnnxModel(exported.path).output_names == tuple(f"output.{name}" for name in names)
    parity = check_parity(model, exported.path, (images(3),))
    assert parity.passed
    assert [output.name for output in parity.outputs] == [f"output.{name}" for name in names]


class Keeping(Net):
    """Keeps what it gave last, as a list that is no buffer."""

    def forward(self, x: Tensor) -> object:
        self.kept = [super().forward(x)]
        return self.kept[0]


def test_a_model_that_keeps_what_it_gave_can_still_be_copied() -> None:
    report = optimize(Keeping(lambda mask, _: mask), images(1), calibration=images(24), measure=False).report
    assert report.sites[1].action == "rewritten"


@pytest.fixture(scope="module")
def result() -> Result:
    return optimize(Net(everything), images(1), calibration=images(24), timer=FalseTimer())


def test_fidelity_and_parity_of_every_output(result: Result) -> None:
    report = result.report
    assert [row.name for row in report.fidelity] == [f"output.{name}" for name in EVERYTHING]
    assert [row.name for row in report.parity] == [row.name for row in report.fidelity]
    assert all(row.passed for row in report.parity)
    by_name = dict(zip(EVERYTHING, report.fidelity, strict=True))
    with torch.no_grad():
        original, rewritten = Net(everything), result.model
        held_out = torch.cat([x for (x,) in read_calibration(images(24), (images(1),)).held_out])
        before, after = original(held_out), rewritten(held_out)
    assert isinstance(before, dict)
    equal = float((before["classes"] == after["classes"]).double().mean())
    assert 0.5 < equal < 1
    assert by_name["classes"].equal_share == pytest.approx(equal, abs=1e-3)
    assert by_name["classes"].relative_error == pytest.approx(1 - equal, abs=1e-3)
    assert by_name["on"].equal_share is not None
    assert by_name["scores"].top1_agreement is not None
    assert (by_name["mask"].equal_share, by_name["mask"].top1_agreement) == (None, None)
    error = float((before["mask"] - after["mask"]).norm() / before["mask"].norm())
    assert by_name["mask"].relative_error == pytest.approx(error, rel=1e-3)


def test_what_is_no_tensor_is_said_once_in_every_form(result: Result) -> None:
    (note,) = [note for note in result.report.notes if "no tensors" in note]
    assert note.endswith("neither exported nor compared: output.name (str), output.threshold (float)")
    for render in (render_text, render_markdown, render_html):
        assert render(result.report).count("output.threshold") == 1


def test_every_form_of_the_report_has_the_equal_entries(result: Result) -> None:
    text = render_text(result.report)
    rows = [line.split() for line in text.splitlines() if line.startswith("output.classes ")]
    share = result.report.fidelity[1].equal_share
    assert share is not None
    assert rows[0][:2] == ["output.classes", "discrete"] and rows[0][-2:] == [f"{100 * share:.1f}", "%"]
    assert set(rows[0][2:-2]) == {"-"}
    assert rows[1] == ["output.classes", "0.0e+00", "-", "100.0", "%", "1e-03", "passed"]
    assert f"equal entries {100 * share:.1f} %, " in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert text.split().count("entries") == 3  # a header's words stand below each other
    for render in (render_markdown, render_html):
        assert render(result.report).count("equal entries") == 3


def test_verify_shows_and_gates_every_output(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "out")
    model = tmp_path / "composite_net.py"
    model.write_text("from test_composite_outputs import Net, everything\n\ndef make():\n    return Net(everything)\n")
    pair = (f"{model}:make", tmp_path / "out" / "model.onnx", "--input", "8x3x12x12", "--expect", "fidelity")
    ran = call("verify", *pair)
    assert ran.code == 0, ran.err
    assert {"equal", "entries", "unexpl.", "variance"} <= set(ran.said.split())
    assert "not compared, as they are no tensors: output.name (str), output.threshold (float)" in ran.said
    assert call("verify", *pair, "--agreement", "0.01").code == 0
    failed = call("verify", *pair, "--error", "0.0001")
    assert failed.code == 1
    assert "relative error" in failed.message
