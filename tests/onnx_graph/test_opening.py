"""ONNX files and models from memory: opened, or refused with what to do."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_texts import classifier, graph, made_of, noise, told

from convrewrite.errors import ModelLoadError
from convrewrite.meanings import Evaluation
from convrewrite.onnx_files import digest_of, model
from convrewrite.onnx_graph import exporter_of, open_onnx, read_network
from convrewrite.runtime.measurement import measure_files

ENDLESS = """
(float[N, 4] x) => (float[N, 4] y) {
    going = Constant<value = bool {1}>()
    y = Loop<body = body (int64 step, bool before, float[N, 4] state) => (bool after, float[N, 4] next) {
        total = ReduceSum<keepdims = 0>(state)
        twice = Add(total, total)
        never = IsNaN(twice)
        after = Not(never)
        next = Relu(state)
    }>("", going, x)
}
""".replace('""', "")


def saved(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, str(path))
    return path


def test_a_file_is_opened_as_it_is(tmp_path: Path) -> None:
    path = saved(classifier(), tmp_path)
    before = path.read_bytes()
    opened = open_onnx(str(path))
    assert (opened.path, opened.file.folder, opened.file.source) == (path, tmp_path, str(path))
    assert (opened.file.opset, opened.session.input_names, opened.scratch) == (17, ("image",), None)
    assert opened.file.model == classifier()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("name", ["stem", "image", "logits", "stem_weight"])
def test_names_that_are_no_text_are_refused(tmp_path: Path, name: str) -> None:
    whole = classifier().SerializeToString()
    assert name.encode() in whole
    path = tmp_path / "model.onnx"
    path.write_bytes(whole.replace(name.encode(), name[:-1].encode() + b"\xff"))
    with pytest.raises(ModelLoadError, match=r"(?i)utf-8"):
        read_network(path)


def test_a_relative_path_still_leads_there_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(classifier(), tmp_path)
    monkeypatch.chdir(tmp_path)
    opened = open_onnx("model.onnx")
    monkeypatch.chdir(os.sep)
    assert opened.path.is_file()
    assert opened.file.source == "model.onnx"


def test_a_model_from_memory_lies_in_a_scratch_folder_as_long_as_it_is_used() -> None:
    model = classifier()
    opened = open_onnx(model)
    assert opened.file.source == "ModelProto agraph"
    assert opened.scratch is not None
    path = opened.path
    assert path.parent == opened.scratch.path
    assert onnx.load(str(path)) == model == classifier()
    opened.scratch.__exit__(None, None, None)
    assert not path.exists()


def test_the_scratch_folder_outlives_the_caller_of_read_network() -> None:
    network = read_network(classifier())
    assert network.module(noise(2, 3, 16, 16))["logits"].shape == (2, 10)
    assert network.inputs[0].shape == (1, 3, 16, 16)
    assert network.notes == ()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"no model at all", "model.onnx"),
        (b"\x08\x08", "model.onnx"),
    ],
    ids=["empty", "pointer", "text", "cut"],
)
def test_what_is_no_onnx_is_told(content: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=found) as told:
        open_onnx(path)
    assert any(advice in str(told.value) for advice in ("export it again", "download it again", "git lfs pull"))


def test_a_cut_file_is_told(tmp_path: Path) -> None:
    path = saved(classifier(), tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        open_onnx(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no such file; expected an ONNX file"):
        open_onnx(tmp_path / "nothing.onnx")
    with pytest.raises(ModelLoadError, match=r"no regular file"):
        open_onnx(tmp_path)


def test_operators_of_a_library_are_refused_unless_trusted(tmp_path: Path) -> None:
    """With trust it is onnxruntime that does not know them here."""
    model = graph("(float[N, 4] x) => (float[N, 4] y) { y = own.Thing(x) }")
    path = saved(model, tmp_path)
    with pytest.raises(ModelLoadError, match="found Thing of own, which is code from elsewhere"):
        open_onnx(path)
    with pytest.raises(ModelLoadError, match="found Thing of own, which is code from elsewhere"):
        open_onnx(model)
    with pytest.raises(ModelLoadError) as told:
        open_onnx(path, trust=True)
    assert "code from elsewhere" not in str(told.value)
    assert "onnxruntime cannot open it" in str(told.value)


def test_a_function_of_the_file_is_no_operator_of_a_library(tmp_path: Path) -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y) { y = own.Thing(x) }")
    nodes = [onnx.helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(
        onnx.helper.make_function("own", "Thing", ["a"], ["b"], nodes, [onnx.helper.make_opsetid("", 17)])
    )
    opened = open_onnx(saved(model, tmp_path))
    assert torch.equal(opened.session(torch.tensor([[-1.0, 2, 3, 4]]))["y"], torch.tensor([[0.0, 2, 3, 4]]))


def outside(folder: Path, location: str) -> Path:
    model = classifier()
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    path = saved(model, folder)
    stored = onnx.load(str(path), load_external_data=False)
    for tensor in stored.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    path.write_bytes(stored.SerializeToString())
    return path


def test_weights_beside_the_file_are_left_there(tmp_path: Path) -> None:
    opened = open_onnx(outside(tmp_path, "weights.bin"))
    [stem] = [tensor for tensor in opened.file.model.graph.initializer if tensor.name == "stem_weight"]
    assert not stem.raw_data
    [kernel] = [tensor for tensor in classifier().graph.initializer if tensor.name == "stem_weight"]
    assert (opened.file.array(stem) == onnx.numpy_helper.to_array(kernel)).all()


def test_a_file_that_is_changed_later_is_not_taken_for_the_one_that_was_opened(tmp_path: Path) -> None:
    path = outside(tmp_path, "weights.bin")
    first, second = open_onnx(path).source_files, open_onnx(path).source_files
    assert first.digest().startswith(digest_of(path))
    for file in (path, tmp_path / "weights.bin"):
        os.utime(file, ns=(1, 1))
    first.require_unchanged()  # touched, and the same
    with pytest.raises(
        ModelLoadError, match=r"model\.onnx: expected the file that was opened, found that it has been chang"
    ):
        second.digest()
    with path.open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(ModelLoadError, match=r"worked on; run this again"):
        first.require_unchanged()
    third = open_onnx(outside(tmp_path, "weights.bin")).source_files
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelLoadError, match=r"weights\.bin: expected the file that was opened"):
        third.digest()


def test_nothing_is_measured_or_made_of_a_file_that_was_changed(tmp_path: Path) -> None:
    module = made_of(classifier(), tmp_path)
    path, exporter = told(module).opened.path, exporter_of(module)
    exporter.original(module, (), tmp_path)
    path.write_bytes(b"another")
    for step in (
        lambda: exporter.original(module, (), tmp_path),
        lambda: exporter.rewritten(module, (), tmp_path / "result.onnx", {}),
        lambda: measure_files(exporter, (path, path), Evaluation((), "no inputs"), None),
        lambda: exporter.source,
    ):
        with pytest.raises(ModelLoadError, match="changed or removed while it was worked on"):
            step()


def test_a_model_from_memory_is_called_so_where_it_is_refused() -> None:
    model = graph("(float[N, 4] x) => (float[N, 5] y) { y = MatMul(x, nothing) }")
    with pytest.raises(ModelLoadError, match=r"^ModelProto \w*: onnxruntime cannot open it") as refused:
        open_onnx(model)
    assert "given.onnx" not in str(refused.value)
    model = graph("(float[N, 4] x) => (float[N, 5] y) { y = Reshape(x, sizes) }", {"sizes": np.array([7, 7])})
    with pytest.raises(ModelLoadError, match=r"^ModelProto \w*: onnxruntime cannot run it on these inputs"):
        read_network(model)


@pytest.mark.parametrize("up", ["../weights.bin", "absolute"])
def test_weights_outside_of_the_folder_are_refused(up: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    location = str(tmp_path / "weights.bin") if up == "absolute" else up
    path = outside(tmp_path / "model", location)
    (tmp_path / "model" / "weights.bin").rename(tmp_path / "weights.bin")
    with pytest.raises(ModelLoadError, match=r"expected weights in the folder of the file, found .*weights\.bin"):
        open_onnx(path)


def test_a_model_from_memory_has_its_weights(tmp_path: Path) -> None:
    path = outside(tmp_path, "weights.bin")
    with pytest.raises(
        ModelLoadError, match=r"found some in files beside it \(weights\.bin\); give the path of its file"
    ):
        open_onnx(onnx.load(str(path), load_external_data=False))
    x = noise(2, 3, 16, 16)
    expected = open_onnx(path).session(x)["logits"]
    marked = classifier()  # its numbers are still in it, and go to a file of their own once it is written
    onnx.external_data_helper.convert_model_to_external_data(marked, location="weights.bin", size_threshold=0)
    for given in (onnx.load(str(path)), marked):
        held = open_onnx(given)  # as long as this, the file is there
        assert torch.equal(held.session(x)["logits"], expected)


def test_weights_that_are_not_there_are_told(tmp_path: Path) -> None:
    path = outside(tmp_path, "weights.bin")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(
        ModelLoadError, match=r"weights\.bin.*put the file of its weights where it was, beside the model"
    ):
        open_onnx(path)


@pytest.mark.parametrize(
    ("kind", "found"), [("pipe", "another thing as 'other'"), ("folder", "another thing"), ("none", "no such file")]
)
def test_what_is_no_file_is_not_read_for_weights_that_nothing_uses(kind: str, found: str, tmp_path: Path) -> None:
    """onnxruntime does not look for these; a copy of the graph takes them along."""
    stored = classifier()
    unused = stored.graph.initializer.add(name="unused", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    unused.external_data.add(key="location", value="other")
    if kind == "pipe":
        os.mkfifo(tmp_path / "other")
    elif kind == "folder":
        (tmp_path / "other").mkdir()
    (tmp_path / "m.onnx").write_bytes(stored.SerializeToString())
    with pytest.raises(ModelLoadError, match=rf"m\.onnx: expected weights in .*, found {found}.*; put"):
        open_onnx(tmp_path / "m.onnx")


def test_a_graph_that_never_ends_is_stopped_where_it_is_tried(tmp_path: Path) -> None:
    path = saved(graph(ENDLESS), tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"runs on these inputs within 4 s .*, found that it does not end in that time"
    ):
        read_network(path, seconds=4)


def test_a_file_is_tried_in_another_process_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "open_session", lambda *_args: pytest.fail("it was opened here"))
    with pytest.raises(ModelLoadError, match="onnxruntime cannot open it"):
        open_onnx(saved(graph("(float[N, 4] x) => (float[N, 5] y) { y = MatMul(x, nothing) }"), tmp_path))


def test_a_graph_without_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="expected a graph with inputs, found none"):
        read_network(saved(graph("() => (float[4] y) { y = Relu(w) }", {"w": (4,)}), tmp_path))


@pytest.mark.parametrize(("text", "opset", "advice"), [
    ("y = Nonesuch(x)", 17, "older opset"), ("y = Relu(x)", 99, "older opset"),
    ("y = MatMul(x, x) y = Neg(x)", 17, "export it again"),
])  # fmt: skip
def test_what_onnxruntime_refuses_is_told_with_what_to_do(text: str, opset: int, advice: str, tmp_path: Path) -> None:
    path = saved(graph(f"(float[N, 4] x) => (float[N, 4] y) {{ {text} }}", opset=opset), tmp_path)
    with pytest.raises(ModelLoadError, match=r"onnxruntime cannot open it: ") as told:
        open_onnx(path)
    assert advice in str(told.value)
    assert "bytes of memory" not in str(told.value)
