"""Forms besides ONNX: found, refused where their packages are missing, written by stand-ins, and held to torch."""

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from commands import images, small_network
from torch import Tensor, nn

import convrewrite
from convrewrite.errors import ExportError, UsageError
from convrewrite.exports import (
    Judged,
    Made,
    Reference,
    Source,
    Written,
    discovery,
    file_names,
    kinds_of_exports,
    named_exports,
    rehearse,
    write_all,
)
from convrewrite.exports.export import Opened
from convrewrite.exports.kinds.torch_export import TorchExport
from convrewrite.exports.programs import free_program
from convrewrite.exports.writing import _batches
from convrewrite.inputs import Inputs
from convrewrite.meanings import Meaning, tell
from convrewrite.onnx_files import OnnxModel, read_model
from convrewrite.onnx_graph.observing import with_outputs
from convrewrite.progress import silent

EXAMPLE = (images(1),)
HELD_OUT = ((images(7, seed=5),),)


class Nested(nn.Module):
    """Its outputs in containers, and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network()

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.inner(x)
        return {"z": y, "more": (y.softmax(1), None)}


def reference_of(model: nn.Module, batches: tuple[Inputs, ...] = HELD_OUT) -> Reference:
    return Reference(model, model, batches, tell(model, batches, {}), lambda inputs: inputs)


def written(name: str, model: nn.Module, folder: Path, **said: Any) -> Written:
    source = Source(EXAMPLE, model, **said)
    [found] = write_all(named_exports([name]), source, reference_of(model), folder, silent)
    return found


def test_the_forms_are_found_and_write_files_of_their_own() -> None:
    known = kinds_of_exports()
    assert sorted(known) == ["coreml", "executorch", "half", "openvino", "torch_export"]
    names = [name for export in known.values() for name in export.files]
    assert len(set(names)) == len(names) == len(file_names())
    assert all(
        name.startswith("model.") and name not in ("model.pt", "model.onnx", "model.int8.onnx") for name in names
    )
    assert [export.name for export in named_exports(["half", "openvino", "half"])] == ["half", "openvino"]
    with pytest.raises(UsageError, match=r"export: expected one of .*openvino.*, found 'tflite'"):
        named_exports(["tflite"])


@pytest.mark.parametrize(("name", "package"), [("executorch", "executorch"), ("coreml", "coremltools")])
def test_a_package_that_is_missing_or_broken_is_told_in_one_line_before_any_work(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"export {name}: needs the package {package}, .*; pip install {package}$"):
        convrewrite.Settings(export=(name,))
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{package}.py").write_text("raise OSError('undefined symbol: aten')")
    with pytest.raises(
        UsageError, match=r"is installed here, and cannot be used: .*; install a version that fits"
    ) as told:
        convrewrite.Settings(export=(name,))
    assert "\n" not in str(told.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network with nested outputs, and its ONNX file."""
    model = Nested().eval()
    return model, convrewrite.export(model, EXAMPLE, tmp_path_factory.mktemp("onnx") / "model.onnx").path


@pytest.mark.parametrize("name", ["openvino", "torch_export", "half"])
def test_what_is_installed_here_is_written_and_held_to_torch(
    name: str, exported: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, onnx = exported
    found = written(name, model, tmp_path, onnx=onnx)
    assert found.refused is None
    assert tuple(path.name for path in found.files) == named_exports([name])[0].files
    assert found.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert found.examples == 7
    assert found.parity is not None and found.fidelity is not None
    assert found.parity[1] <= found.parity[2] == {"half": 2e-2}.get(name, 2.0**-11)
    assert found.fidelity.least_agreement == 1.0


def test_torch_export_takes_any_batch_or_says_why_not(tmp_path: Path) -> None:
    class OfTwo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).reshape(2, 768)

    found = written("torch_export", small_network(), tmp_path)
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert program(images(3)).shape == (3, 10)
    assert found.notes == ()
    source, model = Source((images(2),), OfTwo()), OfTwo()
    [fixed] = write_all(
        named_exports(["torch_export"]), source, reference_of(model, ((images(5)[:2],),)), tmp_path, silent
    )
    assert fixed.refused is None
    assert fixed.notes[0].startswith("batch size fixed at 2: ")


def test_torch_export_does_not_claim_batches_at_which_the_model_takes_another_branch() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] > 16 else x

    _, made = free_program(Source((images(2),), Branches()))
    assert made.batch == 2 and "where the batch is at most 16" in made.notes[0]


def test_a_model_that_works_on_its_inputs_in_place_is_compared_on_those_that_were_given(tmp_path: Path) -> None:
    class InPlace(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    model, given = InPlace(nn.Conv2d(3, 4, 3)).eval(), images(7, seed=5)
    source, reference = Source(EXAMPLE, model), reference_of(model, ((given.clone(),),))
    [found] = write_all(named_exports(["torch_export"]), source, reference, tmp_path, silent)
    assert found.fidelity is not None and found.fidelity.worst_error < 1e-5
    assert torch.equal(reference.batches[0][0], given)


def test_axes_that_were_asked_for_are_free_in_the_program_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval()
    found = written("torch_export", model, tmp_path, free_axes=("height",))
    assert found.refused is None
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert program(torch.zeros(1, 3, 40, 16)).shape == (1, 4, 40, 16)
    with pytest.raises(AssertionError, match=r"Guard failed: .*\[3\] == 16"):
        program(torch.zeros(1, 3, 16, 40))


class Lying(TorchExport):
    """Opens something else than it wrote."""

    name, files = "lying", ("model.lying",)

    def open(self, path: Path) -> Opened:
        run = super().open(path)
        return lambda inputs: [1.01 * torch.as_tensor(output) for output in run(inputs)]


class Failing(TorchExport):
    """Leaves half a file."""

    name, files = "failing", ("model.failing",)

    def write(self, source: Source, path: Path) -> Made:
        path.write_text("half")
        raise RuntimeError("no kernel for\nConv")


class Blind(TorchExport):
    """Runs elsewhere only."""

    name, files = "blind", ("model.blind",)

    def runs_here(self) -> str | None:  # type: ignore[override]
        return "there is no such device"


class Mute(TorchExport):
    """Loses an output."""

    name, files = "mute", ("model.mute",)

    def open(self, path: Path) -> Opened:
        return lambda inputs: []


def test_what_fails_or_lies_leaves_no_file_and_says_why(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    exports = (Failing(), Lying(), Mute(), Blind(), TorchExport())
    failing, lying, mute, blind, whole = write_all(
        exports, Source(EXAMPLE, model), reference_of(model), tmp_path, silent
    )
    assert failing.refused == "cannot be written: RuntimeError: no kernel for Conv"
    assert str(lying.refused).startswith(
        "output 'output': expected lying within 4.9e-04 of torch (relative), found 0.01"
    )
    assert mute.refused == "mute: expected 1 outputs, found 0; mend the runtime, or name another"
    assert (failing.files, lying.files, mute.files) == ((), (), ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.blind", "model.pt2"]
    assert (blind.refused, blind.parity) == (None, None)
    assert blind.notes == ("not compared with torch here: there is no such device",)
    assert whole.parity is not None
    with pytest.raises(ExportError, match="export failing: cannot be made of the original: RuntimeError: no kernel"):
        rehearse([Failing()], Source(EXAMPLE, model))


def test_a_form_is_refused_where_there_is_not_what_it_is_made_of(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"export half: is made of the ONNX file, found none; leave out --no-onnx"):
        rehearse(named_exports(["half"]), Source(EXAMPLE, small_network()))
    with pytest.raises(UsageError, match="export torch_export: expected a PyTorch model, found an ONNX graph"):
        rehearse(named_exports(["torch_export"]), Source(EXAMPLE, onnx=tmp_path / "model.onnx"))


def test_another_package_adds_one_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("lying", f"{__name__}:Lying", discovery.ENTRY_POINTS)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Lying.__module__])
    found = {discovery.ENTRY_POINTS: [point]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found.get(group, []))
    assert [export.name for export in named_exports(["lying"])] == ["lying"]
    assert "model.lying" in file_names()


EXECUTORCH = {
    "executorch/exir.py": """
import pickle

class Lowered:
    def __init__(self, program):
        self.program = program
    def to_executorch(self):
        return self
    def write_to_file(self, file):
        import torch
        torch.export.save(self.program, file)

def to_edge_transform_and_lower(program, partitioner):
    assert [type(one).__name__ for one in partitioner] == ["XnnpackPartitioner"]
    return Lowered(program)
""",
    "executorch/backends/xnnpack/partition/xnnpack_partitioner.py": "class XnnpackPartitioner: pass",
    "executorch/runtime.py": """
import torch

class Method:
    def __init__(self, module):
        self.module = module
    def execute(self, inputs):
        assert isinstance(inputs, list)
        with torch.no_grad():
            return list(self.module(*inputs))

class Runtime:
    @staticmethod
    def get():
        return Runtime()
    def load_program(self, path):
        self.module = torch.export.load(path).module()
        return self
    def load_method(self, name):
        assert name == "forward"
        return Method(self.module)
""",
}
"""What of ExecuTorch is called, with programs of torch in its files."""

COREMLTOOLS = {
    "coremltools/__init__.py": """
from types import SimpleNamespace as Of
import torch
from pathlib import Path
precision = Of(FLOAT32="float32")

class MLModel:
    def __init__(self, path):
        self.path = Path(path)
        self.module = torch.export.load(self.path / "program").module()
    def get_spec(self):
        return Of(description=Of(input=[Of(name="x")], output=[Of(name="var_9"), Of(name="var_7")]))
    def predict(self, feed):
        assert list(feed) == ["x"]
        found = self.module(torch.from_numpy(feed["x"]))
        return {"var_7": found[1].detach().numpy(), "var_9": found[0].detach().numpy()}

class Converted:
    def __init__(self, program):
        self.program = program
    def save(self, path):
        Path(path).mkdir()
        torch.export.save(self.program, Path(path) / "program")

models = Of(MLModel=MLModel)

def convert(program, convert_to, compute_precision, skip_model_load):
    assert (convert_to, compute_precision, skip_model_load) == ("mlprogram", "float32", True)
    return Converted(program)
""",
}
"""The same of coremltools."""


def installed(package: str, files: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in where Python finds it, with its version."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / f"{package}-7.8.dist-info").mkdir()
    (folder / f"{package}-7.8.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: 7.8\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("name", "package", "files", "system"),
    [("executorch", "executorch", EXECUTORCH, "linux"), ("coreml", "coremltools", COREMLTOOLS, "darwin")],
)
def test_with_a_stand_in_for_its_package_a_form_is_written_opened_and_compared(
    name: str, package: str, files: dict[str, str], system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(package, files, tmp_path / "site", monkeypatch)
    monkeypatch.setattr("convrewrite.exports.kinds.core_ml.sys.platform", system)
    place, model = tmp_path / "out", Nested().eval()
    place.mkdir()
    found = written(name, model, place)
    assert (found.refused, found.package) == (None, f"{package} 7.8")
    assert found.parity is not None and found.parity[1] == 0.0
    assert found.examples == 7  # one at a time, as the example has one
    assert [path.name for path in place.iterdir()] == list(named_exports([name])[0].files)
    assert found.size > 1000
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        del sys.modules[module]


def test_core_ml_is_not_compared_but_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("coremltools", COREMLTOOLS, tmp_path / "site", monkeypatch)
    monkeypatch.setattr("convrewrite.exports.kinds.core_ml.sys.platform", "linux")
    found = written("coreml", nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), tmp_path)
    assert found.notes == ("not compared with torch here: Core ML models run on macOS alone",)
    assert found.parity is None and found.files == (tmp_path / "model.mlpackage",)
    del sys.modules["coremltools"]


def test_a_file_for_very_many_examples_is_compared_on_one_batch() -> None:
    found = _batches([(torch.zeros(200, 1),), (torch.zeros(200, 1),)], 300)
    assert [len(batch[0]) for batch in found] == [300]


def test_a_file_for_more_examples_than_are_held_out_is_refused(tmp_path: Path) -> None:
    class OfFour(TorchExport):
        def write(self, source: Source, path: Path) -> Made:
            super().write(source, path)
            return Made(batch=9)

    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    exports: Sequence[Any] = (OfFour(),)
    [found] = write_all(exports, Source(EXAMPLE, model), reference_of(model), tmp_path, silent)
    assert str(found.refused).startswith("expected at least 9 held-out inputs")


def test_a_full_disk_ends_an_export_and_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(EXAMPLE, small_network())
    with pytest.raises(OSError, match="No space left on device"):
        TorchExport().write(source, Path("/dev/full"))
    monkeypatch.setattr(TorchExport, "write", lambda *_: Path("/dev/full").write_bytes(bytes(1 << 20)))
    with pytest.raises(UsageError, match=rf"{tmp_path}.*: cannot be written \(No space left on device\)"):
        write_all(named_exports(["torch_export"]), source, reference_of(small_network()), tmp_path, silent)
    with pytest.raises(UsageError, match="name another folder for temporary files in TMPDIR"):
        rehearse(named_exports(["torch_export"]), source)

    def says_nothing(_export: TorchExport, _source: Source, path: Path) -> None:
        path.symlink_to("/dev/full")
        raise RuntimeError("iostream error")

    monkeypatch.setattr(TorchExport, "write", says_nothing)
    with pytest.raises(UsageError, match=rf"{tmp_path}.*: cannot be written \(No space left on device\)"):
        write_all(named_exports(["torch_export"]), source, reference_of(small_network()), tmp_path, silent)


CHOOSING = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 1, 4] x) => (int64[k, 3] chosen)
    <float[4] w = {1.0001, 1.0003, 1.0, 1.0002},
     float[1, 4, 4] boxes = {0, 0, 1, 1,  2, 2, 3, 3,  4, 4, 5, 5,  6, 6, 7, 7}, int64[1] most = {4}>
    { scores = Mul(x, w)  chosen = NonMaxSuppression(boxes, scores, most) }
"""


def test_half_is_held_to_what_detections_are_chosen_from(tmp_path: Path) -> None:
    """Which are chosen, and in which order, changes with every rounding: the four weights are equal in half precision."""
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(CHOOSING), str(path))
    batch = (torch.ones(1, 1, 4),)

    def judged(file: Path) -> OnnxModel:
        return OnnxModel(with_outputs(read_model(file), ["scores"]).SerializeToString(), trust=True)

    whole, meanings = OnnxModel(path, trust=True), {"scores": Meaning("values", "told")}
    reference = Reference(whole, whole, (batch,), meanings, lambda inputs: inputs)
    source = Source(batch, onnx=path, batch=1)
    [refused] = write_all(named_exports(["half"]), source, reference, tmp_path, silent)
    assert refused.refused is not None and "of the result's ONNX file (relative), found" in refused.refused
    by_choice = replace(reference, judged=Judged(judged(path), judged(path), judged))
    [found] = write_all(named_exports(["half"]), source, by_choice, tmp_path, silent)
    assert found.refused is None and found.fidelity is not None
    assert [output.name for output in found.fidelity.outputs] == ["scores"]
    assert "model.half.onnx" in [file.name for file in found.files]


WITH_FUNCTION = """
    <ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    g (float[n, 4] x) => (float[n, 4] y) { y = mine.Act(x) }
    <domain: "mine", opset_import: ["" : 17]>
    Act (i) => (o) { s = Sigmoid(i)  o = Mul(i, s) }
"""


def test_openvino_takes_a_graph_with_functions(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(WITH_FUNCTION), str(tmp_path / "model.onnx"))
    [form], x = named_exports(["openvino"]), torch.randn(3, 4)
    form.write(Source((x,), onnx=tmp_path / "model.onnx"), tmp_path / "model.xml")
    torch.testing.assert_close(torch.as_tensor(form.open(tmp_path / "model.xml")((x,))[0]), nn.functional.silu(x))
