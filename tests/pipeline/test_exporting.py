"""Other forms of a result: in a run, and of one that lies in a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from clocks import FalseTimer, in_place_of_this_machine
from commands import INPUT, call, images, listing, small_network
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import convrewrite
from convrewrite.calibration import Calibration, calibrate
from convrewrite.errors import ExportError, ModelLoadError, PlanError, UsageError
from convrewrite.exports import Made, Source, Written, discovery, kinds_of_exports
from convrewrite.exports.kinds.torch_export import TorchExport
from convrewrite.inputs import Inputs
from convrewrite.meanings import Evaluation
from convrewrite.onnx_files import OnnxModel, opset_of
from convrewrite.onnx_graph import exporter_of, read_network
from convrewrite.pipeline import exporting
from convrewrite.pipeline.forms import Forms
from convrewrite.reporting import Report, render_text
from convrewrite.results import add_exports, read_report
from convrewrite.runtime import TorchExporter

QUICK: dict[str, Any] = {"refine": False, "fast": True}


class Wrong(TorchExport):
    """Writes another model than it is given, once something was rewritten."""

    name, files = "wrong", ("model.wrong",)

    def write(self, source: Source, path: Path) -> Made:
        model = nn.Sequential(source.model, nn.Softmax(1)).eval()
        return super().write(Source(source.inputs, model), path)


def tiny_network() -> nn.Sequential:
    """(N, 3, H, W) -> (N, 5): one convolution that the rule ``separable`` takes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Report]:
    """A model's file, its result in a folder in three more forms, and the report."""
    folder = tmp_path_factory.mktemp("exports")
    torch.save(tiny_network(), folder / "net.pt")
    result = convrewrite.optimize(
        tiny_network(), images(1), ["separable"], images(24), timer=FalseTimer(), name=str(folder / "net.pt"), half=True,
        export=["openvino", "torch_export"], opset=20, free_axes=("batch", "height", "width"), **QUICK,
    )  # fmt: skip
    result.save(folder / "out")
    return folder / "net.pt", folder / "out", result.report


def test_a_run_writes_every_form_and_says_how_near_each_is(made: tuple[Path, Path, Report]) -> None:
    _, out, report = made
    assert [row.name for row in report.exports] == ["openvino", "torch_export", "half"]
    for row in report.exports:
        assert row.passed and row.refused is None and row.examples == report.calibration.held_out
        assert row.relative_error is not None and row.tolerance is not None and row.relative_error <= row.tolerance
        assert row.bytes == sum((out / name).stat().st_size for name in row.files) > 0
        assert row.output_error == pytest.approx(report.fidelity[0].relative_error, rel=0.05)
    assert (report.unwritten, report.asked.opset, report.asked.free_axes) == (None, 20, ("batch", "height", "width"))
    assert any("tried at twice the size of each" in note for note in report.notes)
    saved = Report.model_validate_json((out / "report.json").read_text())
    assert saved.model_copy(update={"digests": {}}) == report
    lines = render_text(report).splitlines()
    assert "Exports: other forms against the result" in lines and max(map(len, lines)) <= 80
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "model.openvino.xml, model.openvino.bin" in text and "onnxruntime" in text


def test_the_files_compute_what_the_result_does_at_another_size(made: tuple[Path, Path, Report]) -> None:
    _, out, _ = made
    model = convrewrite.load(out, tiny_network()).eval()
    x = torch.rand(3, 3, 20, 28)
    with torch.no_grad():
        expected = model(x)
    program = torch.export.load(out / "model.pt2").module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    for name, error in (("model.onnx", 1e-4), ("model.half.onnx", 2e-2)):
        found = OnnxModel(out / name)(x)["output"]
        assert float((found - expected).abs().max()) <= error * float(expected.abs().max())
    assert opset_of(onnx.load(str(out / "model.onnx"))) == 20
    compared = convrewrite.verify(model, out / "model.half.onnx", x)  # which says that it is no copy
    assert "in half precision, and" in compared.notes[0]


def test_a_result_in_a_folder_gets_further_forms_and_keeps_all_else(
    made: tuple[Path, Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    _, earlier, _ = made
    out = tmp_path / "out"
    shutil.copytree(earlier, out)
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    found = {discovery.ENTRY_POINTS: [type("Point", (), {"name": "wrong", "load": lambda: Wrong})]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found.get(group, []))
    report = convrewrite.export_result(out, tiny_network(), images(1), images(24), to=["openvino", "wrong"])
    assert [row.name for row in report.exports] == ["openvino", "torch_export", "half", "wrong"]
    assert str(report.unwritten).startswith("export wrong: output 'output': expected wrong within")
    assert Report.model_validate_json((out / "report.json").read_text()) == report
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    changed = {name for name in after if before.get(name) != after[name]}
    assert after.keys() == before.keys()
    assert changed <= {"report.json", "report.md", "report.html", "model.openvino.xml", "model.openvino.bin"}
    assert {path.name: path.read_bytes() for path in earlier.iterdir()}.items() <= {
        **before,
        **after,
    }.items() | before.items()
    with pytest.raises(UsageError, match="--to: expected the name of a form"):
        convrewrite.export_result(out, tiny_network(), to=[])
    monkeypatch.chdir(out)
    with pytest.raises(UsageError, match="mounted, or worked in, cannot be replaced"):
        convrewrite.export_result(".", tiny_network(), to=["openvino"])


def test_later_forms_are_written_as_the_result_was(
    made: tuple[Path, Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the axes and the opset, and judged by the meanings, that its run was asked for; on what it held out."""
    found: dict[str, Any] = {}

    class Noted:
        def write(
            self, _model: object, _file: object, evaluation: Evaluation, samples: object, *_where: object
        ) -> None:
            found.update(kinds={meaning.kind for meaning in evaluation.meanings.values()}, samples=samples)
            raise UsageError("not here")

    def forms_of(
        _names: object, _model: object, _inputs: object, exporter: object, _file: object, axes: object
    ) -> Noted:
        found.update(exporter=exporter, axes=axes)
        return Noted()

    def calibrated(*given: Any, **named: Any) -> Calibration:
        found["seed"] = named["seed"]
        return calibrate(*given, **named)

    monkeypatch.setattr(exporting, "forms_of", forms_of)
    monkeypatch.setattr(exporting, "calibrate", calibrated)
    _, out, report = made
    shutil.copytree(out, tmp_path / "out")
    plan = json.loads((out / "plan.json").read_text())
    for meaning in plan["outputs"].values():
        meaning["kind"] = "embedding"
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    other = report.model_copy(update={"seed": 7, "digests": {}})
    (tmp_path / "out" / "report.json").write_text(other.model_dump_json())
    with pytest.raises(UsageError, match="not here"):
        convrewrite.export_result(tmp_path / "out", tiny_network(), images(1), images(24), to=["half"])
    assert (found["exporter"].opset, found["exporter"].free_axes, found["axes"]) == (20, *[report.asked.free_axes] * 2)
    assert (found["kinds"], found["seed"], sum(len(x) for x, in found["samples"])) == (
        {"embedding"}, 7, report.calibration.fitted_on,
    )  # fmt: skip


def test_the_command_writes_forms_tells_of_them_and_fails_for_what_is_wrong(
    made: tuple[Path, Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, _ = made
    ran = call("export", out, "--to", "half", *INPUT)
    assert ran.code == 0, ran.err
    assert ran.said.endswith(f"Written to {out}: model.half.onnx")
    ran = call("export", out, "--to", "torch_export", "--json", *INPUT)
    rows = {row["name"]: row for row in json.loads(ran.out)["exports"]}
    assert rows["torch_export"]["passed"] and rows["torch_export"]["examples"] == 64
    for words, message in (((), "--to: expected a form"), (("--to", "tflite"), "export: expected one of coreml,")):
        ran = call("export", out, *words, *INPUT)
        assert ran.code == 2 and ran.message.startswith(message)
    known = kinds_of_exports()
    monkeypatch.setattr(discovery, "kinds_of_exports", lambda: known | {"wrong": Wrong()})
    ran = call("export", out, "--to", "wrong", *INPUT)
    assert ran.code == 1 and ran.message.startswith("export wrong: output 'output': expected wrong within")
    assert not (out / "model.wrong").exists()
    assert call("export", out, "--to", "half", *INPUT).code == 0, "what was refused before is not asked for"
    call("export", model, "--to", "half")


def test_a_form_that_turns_out_wrong_is_no_success_and_the_result_is_there(
    made: tuple[Path, Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = made
    known = kinds_of_exports()
    monkeypatch.setattr(discovery, "kinds_of_exports", lambda: known | {"wrong": Wrong()})
    in_place_of_this_machine(monkeypatch, FalseTimer())
    calibration = tmp_path / "x.pt"
    torch.save(images(), calibration)
    out = tmp_path / "out"
    ran = call("optimize", model, "--calib", calibration, "--fast", "--no-onnx", "--export", "wrong", "-o", out)
    assert ran.code == 1, ran.err
    assert ran.message.startswith("export wrong: output 'output': expected wrong within")
    assert "FAILED" in ran.out
    assert (out / "model.pt").is_file() and not (out / "model.wrong").exists()
    assert "No success: export wrong" in (out / "report.html").read_text()


def test_what_cannot_be_is_refused_before_the_long_work(tmp_path: Path) -> None:
    x = images(1)
    with pytest.raises(UsageError, match="export half: is made of the ONNX file, found none"):
        convrewrite.optimize(small_network(), x, calibration=images(), measure=False, half=True)
    with pytest.raises(UsageError, match="--opset, --free-axes: expected an ONNX file to hold for, found --no-onnx"):
        convrewrite.Settings(opset=20, measure=False)

    class ByNumber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x if float(x.sum()) > 1e9 else x * 2)

    with pytest.raises(ExportError, match="export torch_export: cannot be made of the original: "):
        convrewrite.optimize(ByNumber().eval(), x, calibration=images(), measure=False, export=["torch_export"])


def graph_with_rate(folder: Path) -> Path:
    """A graph with an input that is the same for all examples, whose first axis is not theirs."""
    draw = np.random.default_rng(0)
    shapes = {"a": (16, 3, 3, 3), "b": (16, 16, 3, 3)}
    weights = [numpy_helper.from_array(0.2 * draw.normal(size=s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["c"]), helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "b"], ["e"]), helper.make_node("ReduceSum", ["rate"], ["r"], keepdims=0),
        helper.make_node("Mul", ["e", "r"], ["y"]),
    ]  # fmt: skip
    values = {"x": ["batch", 3, 16, 16], "rate": [2], "y": ["batch", 16, 12, 12]}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
    graph = helper.make_graph(nodes, "g", infos[:2], infos[2:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "net.onnx")
    return folder / "net.onnx"


def test_the_result_of_an_onnx_model_goes_where_onnx_goes(tmp_path: Path) -> None:
    path, rate = graph_with_rate(tmp_path), torch.tensor([0.5, 1.0])
    network = read_network(path, {"x": images(1), "rate": rate})
    with pytest.raises(
        UsageError, match=r"--opset, --free-axes: expected a PyTorch model, found an ONNX graph, whose opset"
    ):
        exporter_of(network.module, free_axes=())
    result = convrewrite.optimize(
        network.module, network.inputs, calibration=images(16), measure=False, half=True, **QUICK
    )
    [row] = result.report.exports
    assert row.passed and row.refused is None
    result.save(tmp_path / "out")
    again = convrewrite.export_result(tmp_path / "out", network.module, network.inputs, to=["openvino"])
    assert [(row.name, row.passed) for row in again.exports] == [("half", True), ("openvino", True)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith("model")) == [
        "model.half.onnx", "model.onnx", "model.openvino.bin", "model.openvino.xml",
    ]  # fmt: skip


def test_a_result_of_one_size_is_quantised_and_recovered_as_it_is(tmp_path: Path) -> None:
    model, x, timer = tiny_network(), images(1), FalseTimer()
    result = convrewrite.optimize(model, x, ["separable"], images(16), timer=timer, free_axes=(), **QUICK)
    result.save(tmp_path / "out")
    convrewrite.export_result(tmp_path / "out", model, x, to=["openvino"])
    rows = convrewrite.quantise(tmp_path / "out", model, x, images(16), settings=convrewrite.Settings(timer=timer))
    assert len(rows) == 4
    recovered = convrewrite.recover(tmp_path / "out", model, images(16), x, epochs=10, rate=0.02, timer=timer)
    assert recovered.report.exports == ()
    [note] = [note for note in recovered.report.notes if "left out, as the model is another now" in note]
    assert note == (
        "model.int8.onnx, model.openvino.bin, model.openvino.xml of the result before are left out, as the model is another now; "
        "make anew by `convrewrite export OUT --to openvino --calib PATH` and `convrewrite quantise OUT --calib PATH`"
    )
    recovered.save(tmp_path / "out")
    assert OnnxModel(tmp_path / "out" / "model.onnx").batch == 1
    assert not (tmp_path / "out" / "model.openvino.xml").exists()


@pytest.mark.parametrize("measure", [True, False])
def test_forms_of_a_result_that_recovery_leaves_as_it_was_stay(tmp_path: Path, measure: bool) -> None:
    model, x, timer = tiny_network(), images(1), FalseTimer()
    made = convrewrite.optimize(model, x, ["separable"], images(16), timer=timer, export=["openvino"], **QUICK)
    out = made.save(tmp_path / "out")
    convrewrite.quantise(out, model, x, images(16), settings=convrewrite.Settings(timer=timer))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    asked = {"epochs": 1, "rate": 1e9, "timer": timer, "measure": measure}
    recovered = convrewrite.recover(out, model, images(16), x, **asked)
    assert recovered.report.recovered is not None and recovered.report.recovered.unchanged
    assert recovered.report.exports == made.report.exports
    recovered.save(out)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys()
    forms = ["model.int8.onnx", "model.openvino.bin", "model.openvino.xml", *([] if measure else ["model.onnx"])]
    assert [after[name] for name in forms] == [before[name] for name in forms]
    again = convrewrite.recover(made, model, images(16), x, **asked)
    assert again.report.exports == made.report.exports
    assert (again.save(tmp_path / "new") / "model.openvino.xml").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "model.onnx", "plan.json"])
def test_a_folder_with_other_files_than_its_report_tells_of_is_refused(
    made: tuple[Path, Path, Report], tmp_path: Path, name: str
) -> None:
    _, out, _ = made
    folder, model, x = tmp_path / "out", tiny_network(), images(1)
    shutil.copytree(out, folder)
    if name == "model.onnx":
        convrewrite.export(model, x, folder / name)
    elif name == "plan.json":
        another = convrewrite.optimize(model, x, ["separable"], images(16), budget={"macs": 0.9}, measure=False)
        (folder / name).write_text(another.plan.to_json())
    else:
        tensors = load_file(folder / name)
        save_file({key: 3 * value if key.startswith("2.") else value for key, value in tensors.items()}, folder / name)
    before = listing(folder)
    for ran in (
        lambda: convrewrite.export_result(folder, model, x, to=["half"]),
        lambda: convrewrite.quantise(folder, model, x, images(16)),
    ):
        with pytest.raises(
            ModelLoadError, match=f"{name}: the folder is not what its report describes; expected the {name}"
        ):
            ran()
    assert listing(folder) == before
    report = json.loads((folder / "report.json").read_text())
    assert report["digests"].keys() == {"plan.json", "weights.safetensors", "model.onnx"}
    shutil.copy(out / "plan.json", folder)
    timed = convrewrite.Settings(timer=FalseTimer())
    for earlier in (("plan.json",), ("weights.safetensors", "model.onnx")):
        for file in earlier:
            del report["digests"][file]
        (folder / "report.json").write_text(json.dumps(report))
        if name == "plan.json" or not report["digests"]:
            read = convrewrite.quantise(folder, model, x, images(16), settings=timed)
            assert len(read) == 4, "as earlier versions wrote it"


@pytest.mark.parametrize("other", ["weights", "architecture"])
def test_another_original_is_refused_as_fidelity_is_to_that_of_the_result(
    made: tuple[Path, Path, Report], tmp_path: Path, other: str
) -> None:
    folder, x = tmp_path / "out", images(1)
    shutil.copytree(made[1], folder)
    model = (
        tiny_network() if other == "weights" else nn.Sequential(*list(tiny_network())[:1], *list(tiny_network())[3:])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = listing(folder)
    with pytest.raises(PlanError, match=r"other weights; give the original|made for another model"):
        convrewrite.quantise(folder, model, x, images(16))
    with pytest.raises(PlanError, match=r"other weights; give the original|made for another model"):
        convrewrite.export_result(folder, model, x, to=["half"])
    assert listing(folder) == before


def test_a_form_that_is_left_out_leaves_no_file_of_an_earlier_time(tmp_path: Path) -> None:
    made = convrewrite.optimize(small_network(), images(2)[:1], ["separable"], "weights", measure=False)
    folder = made.save(tmp_path / "out")
    for name in ("model.half.onnx", "model.pt2", "notes.txt"):
        (folder / name).write_text("earlier")
    refused = Written("half", "onnxruntime 1", refused="cannot be written: it overflows")
    add_exports(folder, made.plan, read_report(folder), [refused])
    assert not (folder / "model.half.onnx").exists()
    assert {"model.pt2", "notes.txt", "weights.safetensors"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("batch", "sizes"), [(None, [4, 2]), (1, [1] * 6), (16, [16])])
def test_forms_are_shown_slices_of_a_models_own_inputs_and_whole_what_it_holds(
    batch: int | None, sizes: list[int]
) -> None:
    class Holding(TorchExporter):
        def feed(self, inputs: Inputs) -> Inputs:
            return (*inputs, torch.ones(3, 1, 1))

    forms = Forms(("half",), nn.Identity(), (images(1),), Holding(), None, None, batch)
    shown = forms._source(nn.Identity(), None, [(images(6),)]).samples
    assert [tuple(map(len, inputs)) for inputs in shown] == [(size, 3) for size in sizes]
