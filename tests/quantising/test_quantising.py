"""Scales between stages that change nothing, and int8 files that are chosen by what they keep."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from clocks import FalseTimer
from commands import call, images, small_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convrewrite
from convrewrite.errors import CalibrationError, ExportError, ModelLoadError, UsageError, VerificationError
from convrewrite.inputs import Inputs
from convrewrite.meanings import Meaning
from convrewrite.onnx_files import OnnxModel
from convrewrite.onnx_graph import exporter_of, read_network
from convrewrite.pipeline import quantising
from convrewrite.quantising import evened, quantise_file
from convrewrite.quantising.choosing import _quantised
from convrewrite.quantising.even import _largest, _pairs
from convrewrite.runtime import measure_fidelity


def uneven(groups: int = 8) -> nn.Module:
    """A depthwise stage and its pointwise, as in a site, whose channels between differ by factors of thousands."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.Conv2d(8, 12, 1, groups=2)
    factors = 10.0 ** torch.linspace(-2, 2, 8)
    with torch.no_grad():
        first.weight.mul_(factors.view(-1, 1, 1, 1))
        first.bias.mul_(factors)
        second.weight.div_(factors.view(2, 4).repeat_interleave(6, 0).view(12, 4, 1, 1))
    return nn.Sequential(first, second, nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()


def exported(model: nn.Module, path: Path) -> tuple[Path, list[dict[str, np.ndarray]]]:
    convrewrite.export(model, torch.randn(2, 8, 6, 6), path)
    return path, [
        {"input": torch.randn(8, 8, 6, 6, generator=torch.Generator().manual_seed(seed)).numpy()} for seed in (1, 2)
    ]


@settings(max_examples=3)
@given(power=st.sampled_from([0.0, 0.5, 1.0]), groups=st.sampled_from([1, 4, 8]))
def test_the_float_model_computes_the_same(power: float, groups: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, feeds = exported(uneven(groups), tmp_path_factory.mktemp("even") / "a.onnx")
    model = onnx.load(str(path))
    changed = evened(model, feeds, power)
    [pair] = _pairs(model)
    assert model == onnx.load(str(path)), "the model that was given stays"
    for feed in feeds:
        x = torch.from_numpy(feed["input"])
        a, b = (next(iter(OnnxModel(m.SerializeToString())(x).values())) for m in (model, changed))
        assert not torch.equal(a, b) or power == 0.0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    if power == 1.0:
        [before], [after] = (_largest(m, [pair.between], feeds) for m in (model, changed))
        each = [_largest(model, [pair.between], [feed])[0] for feed in feeds]
        assert (before == np.maximum(*each)).all() and (before > each[1]).any()
        assert before.max() / before.min() > 1000
        assert after.max() / after.min() < 1.01
        assert after.max() == pytest.approx(before.max(), rel=1e-4)


def test_what_is_read_elsewhere_or_stands_apart_is_not_scaled(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            middle = self.a(x)
            return self.b(middle) + middle

    for model in (Shared().eval(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()):
        path, feeds = exported(model, tmp_path / "a.onnx")
        before = onnx.load(str(path))
        assert evened(before, feeds, 1.0) == before


@pytest.mark.parametrize("reads", ["between", "first"])
def test_what_a_branch_reads_is_not_scaled(reads: str) -> None:
    branch = onnx.parser.parse_graph(f"branch () => (float[a, b, c, d] z) {{ z = Identity({reads}) }}")
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 2, 4, 4] x, bool c) => (float[n, 2, 4, 4] y, float[a, b, d, e] z)
        <float[2, 2, 1, 1] first = {1, 2, 300, 4}, float[2, 2, 1, 1] second = {5, 6, 7, 8}>
        { between = Conv(x, first)  y = Conv(between, second)  z = If(c) }
    """)
    made = [onnx.helper.make_attribute(name, branch) for name in ("then_branch", "else_branch")]
    model.graph.node[2].attribute.extend(made)
    feed = {"x": np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32), "c": np.array(True)}
    assert evened(model, [feed], 1.0) == model
    del model.graph.node[2], model.graph.output[1]
    assert evened(model, [feed], 1.0) != model


def test_with_even_ranges_int8_loses_less_and_the_best_way_is_kept(tmp_path: Path) -> None:
    path, feeds = exported(uneven(), tmp_path / "a.onnx")
    batches = [(torch.from_numpy(feed["input"]),) for feed in feeds]
    found = quantise_file(path, tmp_path / "int8.onnx", batches[:1], batches[1:])
    plain = quantise_file(path, tmp_path / "plain.onnx", batches[:1], batches[1:], scales=False)
    assert found.fidelity.worst_error < 0.5 * plain.fidelity.worst_error
    assert found.tried[found.way.describe()] == min(found.tried.values())
    assert len(found.tried) == 6
    assert len(plain.tried) == 2
    again = measure_fidelity(OnnxModel(path), OnnxModel(found.path), batches[1:])
    assert again.worst_error == found.fidelity.worst_error
    kinds = {node.op_type for node in onnx.load(str(found.path)).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    _quantised(onnx.load(str(path)), tmp_path / "same.onnx", feeds[:1], per_channel=True)
    assert (tmp_path / "same.onnx").is_file()


def test_of_an_old_graph_the_way_is_kept_whose_file_opens(tmp_path: Path) -> None:
    text = """<ir_version: 7, opset_import: ["" : 12]> g (float[n, 2, 4, 4] x) => (float[n, 2, 4, 4] y)
        <float[2, 2, 1, 1] w = {1, 2, 3, 4}> { y = Conv(x, w) }"""
    model = onnx.parser.parse_model(text)
    model.training_info.add().update_binding.add(key="w", value="w_new")
    onnx.save(model, tmp_path / "old.onnx")
    data = torch.randn(8, 2, 4, 4)
    found = quantise_file(tmp_path / "old.onnx", tmp_path / "int8.onnx", [(data[:4],)], [(data[4:],)])
    assert list(found.tried) == ["per tensor, no scales"], "DequantizeLinear has no axis before opset 13"
    assert not onnx.load(tmp_path / "int8.onnx").training_info, "its weight is not there any more"

    def refuse(path: Path) -> OnnxModel:
        if path.name == "int8.onnx":
            raise VerificationError(f"{path}: no")
        return OnnxModel(path)

    with pytest.raises(
        ExportError, match="quantiser makes of the model cannot be used: the int8 file: no; do without int8"
    ):
        quantise_file(tmp_path / "old.onnx", tmp_path / "b.onnx", [(data[:4],)], [(data[4:],)], runner=refuse)


def test_detections_are_judged_by_what_they_are_chosen_from_and_examples_without_what_is_held(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
        g (float[3, 1, 1] scale, float[n, 3, 2, 2] x) => (int64[k, 3] chosen)
        <float[4, 3, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}, float[1, 3, 1, 1] v = {1, -1, 1},
         int64[3] rows = {1, 4, 4}, int64[3] row = {1, 1, 4}, int64[1] most = {4}>
        { s = Mul(x, scale) a = Conv(s, w) b = Conv(s, v) boxes = Reshape(a, rows) scores = Reshape(b, row)
          chosen = NonMaxSuppression(boxes, scores, most) }"""
    path, held = tmp_path / "a.onnx", torch.ones(3, 1, 1)
    onnx.save(onnx.parser.parse_model(text), path)
    runner = exporter_of(read_network(path, {"scale": held}).module).runner
    fit, held_out = ([(torch.randn(1, 3, 2, 2),) for _ in range(2)] for _ in range(2))
    found = quantise_file(path, tmp_path / "b.onnx", fit, held_out, runner=runner)
    assert [output.name for output in found.fidelity.outputs] == ["boxes", "scores"]
    assert found.fidelity.examples == 2


def test_inputs_are_needed(tmp_path: Path) -> None:
    path, _ = exported(uneven(), tmp_path / "a.onnx")
    with pytest.raises(
        VerificationError, match="int8: expected inputs to calibrate and to judge on, found none; give r"
    ):
        quantise_file(path, tmp_path / "b.onnx", [], [])
    with pytest.raises(VerificationError, match="found 1 and none; give more"):
        quantise_file(path, tmp_path / "b.onnx", [(torch.zeros(1, 8, 6, 6),)], [])


@pytest.fixture(scope="module")
def result() -> convrewrite.Result:
    """Of a small network, made with a seed of its own."""
    asked = {"timer": FalseTimer(0.5), "refine": False, "fast": True, "seed": 7, "opset": 19}
    return convrewrite.optimize(small_network(), images(2)[:1], ["separable"], images(), **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("calibration", [None, "weights"])
def test_inputs_are_real_ones(calibration: object, result: convrewrite.Result, tmp_path: Path) -> None:
    """Also for a model with the statistics of BatchNorms, which inputs are synthesised from elsewhere."""
    model, x = small_network(), images(2)[:1]
    result.save(tmp_path / "out")
    with pytest.raises(
        CalibrationError, match="int8: expected inputs to calibrate and to judge on, found none; give real"
    ):
        convrewrite.quantise(tmp_path / "out", model, x, calibration)
    assert not (tmp_path / "out" / "model.int8.onnx").exists()


def test_a_result_gets_its_int8_file_and_a_table_of_four(
    result: convrewrite.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, ...]] = []

    def noted(source: Path, place: Path, fit: list[Inputs], held_out: list[Inputs], **named: Any) -> Any:
        quantise_file(source, place, fit, held_out, **named)
        opset = max(one.version for one in onnx.load(str(source)).opset_import)
        counts = (sum(len(one) for (one,) in part) for part in (fit, held_out))
        made.append((source.name, named["original"].name, opset, *counts))
        return SimpleNamespace(way=SimpleNamespace(describe=lambda: f"that of {source.name}"))

    monkeypatch.setattr(quantising, "quantise_file", noted)
    model, x = small_network(), images(2)[:1]
    result.save(tmp_path / "out")
    gone = str(tmp_path / "gone.json")  # times that the run was planned by, perhaps: files are timed here
    timer = FalseTimer(0.5)
    settings = convrewrite.Settings(timer=timer, timings=gone, threads=2)
    rows = convrewrite.quantise(tmp_path / "out", model, x, images(), settings=settings)
    assert [row.name for row in rows] == ["original", "rewritten", "int8 of the original", "int8 of the rewritten"]
    assert rows[2].bytes < rows[0].bytes and rows[3].bytes < rows[1].bytes
    assert [row.macs for row in rows] == [result.report.totals.macs.before, result.report.totals.macs.after] * 2
    assert rows[0].float_error == rows[1].float_error == 0.0 < rows[3].float_error < 0.5
    assert rows[0].fidelity.worst_error == 0.0 < rows[1].fidelity.worst_error
    parts = result.report.calibration.fitted_on, result.report.calibration.held_out
    assert made == [("original.onnx", "original.onnx", 19, *parts), ("model.onnx", "original.onnx", 19, *parts)]
    assert {row.fidelity.examples for row in rows} == {parts[1]}
    assert [row.way for row in rows] == ["", "", "that of original.onnx", "that of model.onnx"]
    names = "original.onnx", "model.onnx", "original.int8.onnx", "model.int8.onnx"
    assert [(a.name, b.name) for a, b, _ in timer.compared] == [("original.onnx", name) for name in names]  # type: ignore[attr-defined]
    assert timer.threads == {2}
    assert (tmp_path / "out" / "model.int8.onnx").stat().st_size == rows[3].bytes
    files = [tmp_path / "out" / name for name in ("model.onnx", "model.int8.onnx")]
    assert convrewrite.verify(*files, x).notes[-1].endswith("in full precision and in int8: fidelity is what counts")
    result.save(tmp_path / "out")  # an earlier result is replaced with its int8 file
    assert not (tmp_path / "out" / "model.int8.onnx").exists()
    with pytest.raises(ModelLoadError, match="missing; expected a result"):
        convrewrite.quantise(tmp_path, model, x, images())


def test_a_run_may_end_with_a_result_for_a_folder_while_another_quantises_what_is_there(
    result: convrewrite.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery may have taken hours by then."""
    result.save(tmp_path / "out")

    def meanwhile(source: Path, place: Path, *_given: object, **_named: object) -> Any:
        result.save(tmp_path / "out")
        place.write_bytes(source.read_bytes())
        return SimpleNamespace(way=SimpleNamespace(describe=lambda: "as it is"))

    monkeypatch.setattr(quantising, "quantise_file", meanwhile)
    settings = convrewrite.Settings(timer=FalseTimer(0.5))
    convrewrite.quantise(tmp_path / "out", small_network(), images(2)[:1], images(), settings=settings)
    assert (tmp_path / "out" / "model.int8.onnx").is_file()


class Two(nn.Module):
    """One output that counts by its direction, and one that is ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.wanted, self.other = small_network(), nn.Linear(10, 8), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.body(x)
        return {"wanted": self.wanted(found), "other": self.other(found)}


def test_int8_is_judged_by_what_the_plan_took_outputs_for(tmp_path: Path) -> None:
    model, x, timer = Two().eval(), images(2)[:1], FalseTimer(0.5)
    asked = {"wanted": "embedding", "other": "ignore"}
    result = convrewrite.optimize(
        model, x, ["separable"], images(), timer=timer, refine=False, fast=True, outputs=asked
    )
    result.save(tmp_path / "out")
    rows = convrewrite.quantise(tmp_path / "out", model, x, images(), settings=convrewrite.Settings(timer=timer))
    assert {(output.name, output.kind) for row in rows for output in row.fidelity.outputs} == {
        ("output.wanted", "embedding")
    }


def test_what_the_result_held_out_is_held_out_here_too(
    result: convrewrite.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small_network(), tmp_path / "m.pt")
    torch.save(images(), tmp_path / "images.pt")
    result.save(tmp_path / "out")

    def split(*_given: object, seed: int, **_named: object) -> None:
        raise UsageError(f"seed {seed}")

    monkeypatch.setattr(quantising, "calibrate", split)
    words = ("quantise", tmp_path / "out", "--model", tmp_path / "m.pt", "--calib", tmp_path / "images.pt")
    assert call(*words).message == "seed 7"
    assert call(*words, "--seed", 3).message == "seed 3"
    with pytest.raises(UsageError, match=r"^seed 7$"):
        convrewrite.quantise(tmp_path / "out", small_network(), images(2)[:1], images())


def test_a_full_disk_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, feeds = exported(uneven(), tmp_path / "a.onnx")

    def without_room(*_given: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", without_room)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\); .* in TMPDIR"):
        _quantised(onnx.load(str(path)), tmp_path / "b.onnx", feeds, True)
    (tmp_path / "c.onnx").symlink_to("/dev/full")
    with pytest.raises(UsageError, match=rf"{tmp_path / 'c.onnx'}: cannot be written \(No space left on device\)"):
        _quantised(onnx.load(str(path)), tmp_path / "c.onnx", feeds, True)


def test_classes_lie_where_the_module_has_them() -> None:
    """Files do not tell: the agreement of a classifier of tokens was computed along the tokens."""
    model = nn.Linear(5, 3).eval()
    baseline: Any = SimpleNamespace(exporter=SimpleNamespace(runner=lambda _path: model))
    data: Any = SimpleNamespace()
    four = quantising._Four(Path("a"), model, baseline, data, {"output": Meaning("logits", "planned")}, progress=print)
    meanings = four._meanings(Path("b"), [(torch.randn(2, 4, 5),)])
    assert meanings is not None and (meanings["output"].kind, meanings["output"].axis) == ("logits", -1)
