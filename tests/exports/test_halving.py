"""float16 of a float32 graph, and what would overflow there."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import images
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from convrewrite.errors import ExportError
from convrewrite.exports import Made, Source, in_slices, named_exports
from convrewrite.exports.halving import LARGEST, ROOM, _within, halved
from convrewrite.onnx_files import OnnxModel

[HALF] = named_exports(["half"])


def scaled(up: float = 1.0, down: float = 1.0, out: float = 1.0, batch: str | int = "batch") -> onnx.ModelProto:
    """Three convolutions; the weights of the first two, and what goes out, are so many times as large."""
    draw = np.random.default_rng(0)
    weights = {
        "up": up * draw.normal(size=(4, 3, 3, 3)), "down": down * draw.normal(size=(4, 4, 1, 1)),
        "last": draw.normal(size=(2, 4, 1, 1)), "out": np.array(out),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "up"], ["a"], name="first"), helper.make_node("Relu", ["a"], ["b"], name="rectified"),
        helper.make_node("Conv", ["b", "down"], ["c"], name="second"), helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "last"], ["e"], name="third"), helper.make_node("Mul", ["e", "out"], ["y"]),
    ]  # fmt: skip
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])
        for name, shape in (("x", (3, 16, 16)), ("y", (2, 14, 14)))
    ]
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def half_of(model: onnx.ModelProto, x: Tensor, folder: Path) -> tuple[onnx.ModelProto, Made, Tensor, Tensor]:
    """The file in half precision, what is said of it, and the outputs of both files."""
    whole, half = folder / "model.onnx", folder / "model.half.onnx"
    onnx.save(model, str(whole))
    batch = OnnxModel(whole).batch
    made = HALF.write(Source((x[:1],), None, whole, batch, samples=in_slices([(x,)], batch)), half)
    [expected] = OnnxModel(whole)(x[: made.batch]).values()
    [found] = HALF.open(half)((x[: made.batch],))
    return onnx.load(str(half)), made, expected, torch.as_tensor(found)


def test_nodes_without_names_get_names_that_no_other_node_has(tmp_path: Path) -> None:
    model = scaled()
    model.graph.node[0].name = "node_3"  # the fourth node has none
    made, _, _, _ = half_of(model, images(2), tmp_path)
    assert {"node_3", "rectified"} <= {node.name for node in made.graph.node}


def test_graphs_of_training_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    model = scaled()
    model.training_info.add().update_binding.add(key="up", value="up_new")
    made, said, _, _ = half_of(model, images(2), tmp_path)
    assert not made.training_info and said.notes[0].startswith("the graphs of training in the ONNX file are left out")


def test_weights_are_halved_and_inputs_and_outputs_stay(tmp_path: Path) -> None:
    made, told, expected, found = half_of(scaled(), images(6), tmp_path)
    kinds = {weight.data_type for weight in made.graph.initializer}
    ends = {entry.type.tensor_type.elem_type for entry in (*made.graph.input, *made.graph.output)}
    assert (kinds, ends, told) == ({TensorProto.FLOAT16}, {TensorProto.FLOAT}, Made())
    assert 0 < float((expected - found).abs().max()) <= 2e-2 * float(expected.abs().max())
    assert made.graph.node[0].op_type == "Cast", "sorted, so that the checker takes it"


@pytest.mark.parametrize(
    ("model", "scale", "kept"),
    [
        (scaled(1e7, 1e-7), 1.0, "3 of 6 nodes stay float32, .*: first, rectified, second$"),
        (scaled(1e-6), 1e6, "1 of 6 nodes stay float32, .*: first$"),
        (scaled(out=1e6), 1.0, "1 of 6 nodes stay float32, .*: node_5$"),
        (scaled(1e6, 1e-6, batch=2), 1.0, "3 of 6 nodes"),
    ],
    ids=["between", "in", "out", "two at a time"],
)
def test_what_would_overflow_stays_float32_and_is_named(
    model: onnx.ModelProto, scale: float, kept: str, tmp_path: Path
) -> None:
    """Between convolutions, in the input, and in the output: no value passes through float16 there."""
    x = images(5) * scale
    made, told, expected, found = half_of(model, x, tmp_path)
    assert found.isfinite().all()
    assert float((expected - found).abs().max()) <= 2e-2 * float(expected.abs().max())
    assert len(told.notes) == 1 and re.match(kept, told.notes[0])
    assert {TensorProto.FLOAT, TensorProto.FLOAT16} == {weight.data_type for weight in made.graph.initializer}
    narrowed = [node.output[0] for node in made.graph.node if node.op_type == "Cast" and node.attribute[0].i == 10]
    session = watching(made, narrowed)
    for name, tensor in session(x[: told.batch]).items():
        assert name not in narrowed or tensor.isfinite().all(), f"{name} overflows"


def watching(model: onnx.ModelProto, names: list[str]) -> OnnxModel:
    """The same with values of float16 as outputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names)
    return OnnxModel(changed.SerializeToString())


def test_a_graph_without_float32_weights_is_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float16), "w")
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT16, s) for n, s in (("x", [1, 3, 4, 4]), ("y", [1, 4, 4, 4]))
    ]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(ExportError, match="expected float32 weights to halve, found none"):
        halved(model, [{"x": np.ones((1, 3, 4, 4), np.float16)}])


def test_casts_of_the_graph_itself_and_graphs_in_nodes_come_through() -> None:
    """Integers made numbers for a node that stays float32, and a branch that reads a value from outside."""
    weight = numpy_helper.from_array(np.full((3,), 1e5, np.float32), "w")
    half = numpy_helper.from_array(np.full((3,), 0.5, np.float32), "h")
    then, other = (
        helper.make_graph(
            [helper.make_node("Add" if name == "then" else "Sub", ["scaled", "h"], [name], name=f"in_{name}")],
            name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name in ("then", "else")
    )  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["n"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real", "w"], ["large"]),
        helper.make_node("Div", ["large", "w"], ["scaled"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
    ]
    inputs = [
        helper.make_tensor_value_info("n", TensorProto.INT64, ["batch", 3]),
        helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "g", inputs, [output], [weight, half])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    feed = {"n": np.arange(6).reshape(2, 3), "yes": np.array(True)}
    found = halved(model, [feed])
    assert len(found.kept) == 2
    onnx.checker.check_model(found.model, full_check=True)
    run = OnnxModel(found.model.SerializeToString())
    for yes in (True, False):
        [y] = run(torch.arange(6).reshape(2, 3), torch.tensor(yes)).values()
        assert y.tolist() == (torch.arange(6).reshape(2, 3) + (0.5 if yes else -0.5)).tolist()


def test_a_mask_of_large_values_is_still_made_a_number() -> None:
    """The graph's own cast reads what a node gives that stays float32, and is none of the converter's."""
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 20]>
        g (float[n, 3] x) => (float[n, 3] y) <float w = {100000.0}, float zero = {0.0}>
        { large = Mul(x, w)  over = Greater(large, zero)  mask = Cast<to = 1>(over)  left = Mul(large, mask)  y = Div(left, w) }
    """)
    x = torch.tensor([[1.0, -2.0, 3.0]])
    found = halved(model, [{"x": x.numpy()}])
    onnx.checker.check_model(found.model, full_check=True)
    [y] = OnnxModel(found.model.SerializeToString())(x).values()
    assert y.tolist() == [[1.0, 0.0, 3.0]]


def test_weights_in_nodes_and_files_of_old_versions_are_halved() -> None:
    model = scaled()
    x = images(3)
    [expected] = OnnxModel(model.SerializeToString())(x).values()
    constants = [helper.make_node("Constant", [], [weight.name], value=weight) for weight in model.graph.initializer]
    within, old = onnx.ModelProto(), onnx.ModelProto()
    within.CopyFrom(model)
    del within.graph.initializer[:]
    for node in reversed(constants):
        within.graph.node.insert(0, node)
    old.CopyFrom(model)
    old.ir_version = 3
    old.opset_import[0].version = 9
    old.graph.input.extend(
        helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, weight.dims) for weight in model.graph.initializer
    )
    for source in (within, old):
        found = halved(source, [{"x": x.numpy()}])
        onnx.checker.check_model(found.model, full_check=True)
        stored = [*found.model.graph.initializer]
        stored += [node.attribute[0].t for node in found.model.graph.node if node.op_type == "Constant"]
        assert {tensor.data_type for tensor in stored} == {TensorProto.FLOAT16}
        assert [entry.name for entry in found.model.graph.input] == ["x"]
        [y] = OnnxModel(found.model.SerializeToString())(x).values()
        assert float((expected - y).abs().max()) <= 2e-2 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("numbers", "within"),
    [
        ([1.0, -16376.0], True),
        ([1.0, 16377.0], False),
        ([1.0, -16377.0], False),  # a quarter of the largest number is 16376
        ([np.inf, -np.inf, 2.0], True),  # masks stay what they are
        ([np.nan, 1e9], False),
        ([], True),
    ],
)
def test_numbers_of_either_sign_have_to_leave_room(numbers: list[float], within: bool) -> None:
    assert _within(np.array(numbers, np.float32), LARGEST / ROOM) is within
