"""Weights in other files: their bytes, their places, and results that one file could not hold."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_surgery_cases import (
    Array,
    assert_same,
    chain_of,
    file_of,
    model_of,
    numbers,
    run,
    tensor,
    value,
    written,
)
from torch import nn

from convrewrite.errors import ExportError, ModelLoadError, UsageError
from convrewrite.onnx_files import is_weights_of
from convrewrite.onnx_graph import external
from convrewrite.onnx_graph.file import OnnxFile, Replacement
from convrewrite.onnx_graph.surgery import write_rewritten

FIRST, SECOND, LAST = numbers(16, 4, 3, 3), numbers(16, 16, 3, 3, seed=1), numbers(8, 16, 1, 1, seed=2)
BIAS = numbers(16, seed=3)
IMAGE = numbers(1, 4, 8, 8, seed=4)


def outside(name: str, array: Array, file: Path, gap: int = 0) -> TensorProto:
    """A tensor whose bytes are appended to a file, after ``gap`` bytes that belong to nobody."""
    with file.open("ab") as written_to:
        written_to.write(b"\xee" * gap)
        offset = written_to.tell()
        written_to.write(array.tobytes())
    made = tensor(name, array)
    made.ClearField("raw_data")
    made.data_location = TensorProto.EXTERNAL
    for key, text in (("location", file.name), ("offset", str(offset)), ("length", str(array.nbytes))):
        made.external_data.add(key=key, value=text)
    return made


def three_convolutions(folder: Path) -> OnnxFile:
    """Two files of weights, the first with gaps; one weight inline, one shared range, one without a length, one of 20 bytes."""
    first, second = folder / "first.bin", folder / "sub.bin"
    weights = [
        outside("odd", numbers(5), first, 4),
        outside("w1", FIRST, first, 64),
        outside("w2", SECOND, second),
        outside("w3", LAST, first, 4032),
        tensor("b1", BIAS),
        outside("b2", BIAS, second, 64),
    ]
    weights[5].external_data.add(key="checksum", value="0" * 40)
    weights.append(onnx.TensorProto.FromString(weights[5].SerializeToString()))
    weights[6].name = "b3"
    del weights[3].external_data[2]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "one"),
        helper.make_node("Conv", ["c1", "w2", "b2"], ["c2"], "two"),
        helper.make_node("Add", ["c2", "shift"], ["c3"]),
        helper.make_node("Conv", ["c3", "w3"], ["y"], "three"),
        helper.make_node("Unsqueeze", ["b3", "axes"], ["shift"]),
    ]
    nodes = [*nodes[:2], nodes[4], *nodes[2:4]]
    weights.append(tensor("axes", np.array([1, 2], np.int64)))
    model = model_of(nodes, weights, [value("x", ["n", 4, 8, 8])])
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return OnnxFile(onnx.load(str(path), load_external_data=False), folder, str(path), path)


def bytes_of(tensor: TensorProto, folder: Path) -> bytes:
    if tensor.data_location != TensorProto.EXTERNAL:
        return bytes(tensor.raw_data)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / entries["location"]).open("rb") as file:
        file.seek(int(entries["offset"]))
        return file.read(int(entries["length"]))


def test_weights_in_other_files_go_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    file = three_convolutions(source)
    listed = {entry.name: entry.read_bytes() for entry in source.iterdir()}
    after, path = written(file, [Replacement(1, chain_of(SECOND, BIAS))], target)
    assert {entry.name: entry.read_bytes() for entry in source.iterdir()} == listed
    names = sorted(entry.name for entry in target.iterdir())
    assert names[0] == "result.onnx" and len(names) == 2 and is_weights_of(names[1], "result.onnx")
    found = {t.name: t for t in after.graph.initializer}
    want = {"w1": FIRST, "w3": LAST, "odd": numbers(5), "b1": BIAS, "b3": BIAS}
    assert {name: bytes_of(found[name], target) for name in want} == {n: a.tobytes() for n, a in want.items()}
    assert not set(found) & {"w2", "b2"}
    assert {t.name for t in found.values() if t.data_location == TensorProto.EXTERNAL} == {
        "odd", "w1", "w3", "b3", "two.stage0.weight", "two.stage1.weight"
    }  # fmt: skip
    for one in found.values():
        entries = {entry.key: entry.value for entry in one.external_data}
        assert set(entries) <= {"location", "offset", "length"}
        assert int(entries.get("offset", 0)) % 64 == 0 and entries.get("location", names[1]) == names[1]
    assert_same(run(file.path or Path(), x=IMAGE), run(path, x=IMAGE))


def test_the_result_stands_alone_when_the_source_is_gone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    file = three_convolutions(source)
    before = run(file.path or Path(), x=IMAGE)
    _, path = written(file, [], target)
    for entry in source.iterdir():
        entry.unlink()
    assert_same(before, run(path, x=IMAGE), 0)


def test_a_range_that_two_tensors_share_is_copied_once(tmp_path: Path) -> None:
    file = three_convolutions(tmp_path)
    _, path = written(file, [], tmp_path)
    weights = next(entry for entry in tmp_path.iterdir() if is_weights_of(entry.name, path.name))
    assert weights.read_bytes().count(BIAS.tobytes()) == 1


def test_a_second_result_in_the_same_place_leaves_no_weights_of_the_first(tmp_path: Path) -> None:
    file = three_convolutions(tmp_path)
    for _ in range(2):
        written(file, [Replacement(0, chain_of(FIRST, BIAS))], tmp_path)
    assert sum(is_weights_of(entry.name, "result.onnx") for entry in tmp_path.iterdir()) == 1


@pytest.mark.parametrize("name", ["model.onnx", "first.bin"])
def test_the_original_is_never_written_over(name: str, tmp_path: Path) -> None:
    file = three_convolutions(tmp_path)
    with pytest.raises(UsageError, match="found the original model; name another place"):
        write_rewritten(file, [], tmp_path / "." / name)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    file = three_convolutions(tmp_path)
    os.truncate(tmp_path / "sub.bin", 100)
    with pytest.raises(ModelLoadError, match=r"weights of w2: expected 9216 bytes from 0 on in .*sub.bin, found 9116"):
        write_rewritten(file, [], tmp_path / "result.onnx")
    (tmp_path / "sub.bin").unlink()
    with pytest.raises(
        ModelLoadError, match=r"weights of w2: .*sub\.bin, found that it cannot be read \(it is no file"
    ):
        write_rewritten(file, [], tmp_path / "result.onnx")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first.bin", "model.onnx"]


@pytest.mark.parametrize(("key", "text"), [("offset", "-64"), ("length", "many"), ("offset", "1.5")])
def test_places_that_cannot_be_are_refused(key: str, text: str, tmp_path: Path) -> None:
    file = three_convolutions(tmp_path)
    for entry in file.model.graph.initializer[1].external_data:
        entry.value = text if entry.key == key else entry.value
    with pytest.raises(ModelLoadError, match="weights of w1: expected where they lie"):
        write_rewritten(file, [], tmp_path / "result.onnx")


def test_weights_inside_of_branches_and_constants_go_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    inner = helper.make_graph(
        [helper.make_node("Add", ["c", "v"], ["m"])], "branch", [], [value("m")],
        [outside("v", BIAS.reshape(1, 16, 1, 1), source / "v.bin")],
    )  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner),
    ]
    model = model_of(nodes, [tensor("w", FIRST), tensor("yes", np.array(True))])
    onnx.save(model, str(source / "model.onnx"))
    x = numbers(1, 4, 9, 10)
    before = run(source / "model.onnx", x=x)
    file = OnnxFile(model, source, "model.onnx", source / "model.onnx")
    after, path = written(file, [Replacement(0, chain_of(FIRST))], target)
    for graph in (attribute.g for attribute in after.graph.node[-1].attribute):
        assert bytes_of(graph.initializer[0], target) == BIAS.tobytes()
    assert_same(before, run(path, x=x))


def test_what_one_file_cannot_hold_goes_to_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "LARGEST_INLINE", 4000)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "one"),
        helper.make_node("Conv", ["c", "w2"], ["y"], "two"),
        helper.make_node("ConstantOfShape", ["shape"], ["unused"]),
    ]
    listed = onnx.TensorProto(
        name="w2", data_type=TensorProto.FLOAT, dims=SECOND.shape, float_data=SECOND.flatten().tolist()
    )
    model = model_of(nodes, [tensor("w1", FIRST), listed, tensor("shape", np.array([2], np.int64))])
    x = numbers(1, 4, 9, 10)
    notes = write_rewritten(file_of(model), [Replacement(0, chain_of(FIRST))], tmp_path / "result.onnx")
    assert notes == ("weights stand in a second file, result.onnx.*.data",)
    after = onnx.load(str(tmp_path / "result.onnx"), load_external_data=False)
    places = {t.name: t.data_location == TensorProto.EXTERNAL for t in after.graph.initializer}
    assert places == {"w2": True, "shape": False, "one.stage0.weight": False, "one.stage1.weight": True}
    moved = next(t for t in after.graph.initializer if t.name == "w2")
    assert not moved.float_data and bytes_of(moved, tmp_path) == SECOND.tobytes()
    assert_same(run(model, x=x), run(tmp_path / "result.onnx", x=x))


def test_small_models_stay_one_file(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w1"], ["y"], "one")]
    model = model_of(nodes, [tensor("w1", FIRST)])
    assert write_rewritten(file_of(model), [Replacement(0, chain_of(FIRST))], tmp_path / "result.onnx") == ()
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.onnx"]


def test_a_fault_of_the_original_is_no_reason_to_refuse(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w1"], ["c"], "one"), helper.make_node("Relu", ["c"], ["y"])]
    faulty = model_of(nodes, [tensor("w1", FIRST)])
    faulty.graph.ClearField("name")
    notes = write_rewritten(file_of(faulty), [Replacement(0, chain_of(FIRST))], tmp_path / "result.onnx")
    assert [note.partition(":")[0] for note in notes] == ["onnx's checker passes neither the original nor the result"]
    x = numbers(1, 4, 9, 10)
    assert_same(run(faulty, x=x), run(tmp_path / "result.onnx", x=x))


def test_a_result_that_cannot_be_used_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w1"], ["y"], "one")]
    model = model_of(nodes, [tensor("w1", FIRST)])
    with pytest.raises(ExportError, match=r"result\.onnx: expected a file that onnxruntime opens, found: "):
        write_rewritten(file_of(model), [Replacement(0, nn.Sequential(nn.Conv1d(4, 16, 3)))], tmp_path / "result.onnx")
    with pytest.raises(ExportError, match="the folder does not exist"):
        write_rewritten(file_of(model), [], tmp_path / "nowhere" / "result.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    """A sparse file of weights of 2.5 GB; its one number that is not zero comes out."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    rows = 5 * 2**27 // 4
    weights = source / "weights.bin"
    with weights.open("wb") as file:
        file.truncate(4 * rows * 4)
        file.seek(4 * rows * 4 - 4)
        file.write(np.float32(7).tobytes())
    table = onnx.TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[rows * 4], data_location=1)
    for key, text in (("location", "weights.bin"), ("offset", "0"), ("length", str(16 * rows))):
        table.external_data.add(key=key, value=text)
    nodes = [
        helper.make_node("Gather", ["table", "last"], ["number"]),
        helper.make_node("Conv", ["x", "w1"], ["c"], "one"),
        helper.make_node("Add", ["c", "number"], ["y"]),
    ]
    model = model_of(nodes, [table, tensor("w1", FIRST), tensor("last", np.array([rows * 4 - 1], np.int64))])
    x = numbers(1, 4, 9, 10)
    onnx.save(model, str(source / "model.onnx"))
    before = run(source / "model.onnx", x=x)
    file = OnnxFile(model, source, "model.onnx", source / "model.onnx")
    try:
        _, path = written(file, [Replacement(1, chain_of(FIRST))], target)
        assert_same(before, run(path, x=x))
        assert before[0].max() > 5
    finally:  # what tests leave behind stays for a while
        for entry in (*source.iterdir(), *target.iterdir()):
            entry.unlink()
