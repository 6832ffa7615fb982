from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_surgery_cases import (
    IMAGE,
    Array,
    B,
    W,
    assert_same,
    chain_of,
    conv_of,
    file_of,
    halves_of,
    model_of,
    numbers,
    run,
    tensor,
    untouched,
    value,
    written,
)  # fmt: skip
from torch import nn

from convrewrite.errors import ExportError
from convrewrite.layers import SumOfBranches
from convrewrite.onnx_graph.file import Replacement
from convrewrite.onnx_graph.surgery import rewritten, write_rewritten


def small(**more: Any) -> onnx.ModelProto:
    """Relu, Conv, Sigmoid."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "before", doc_string="kept"),
        helper.make_node("Conv", ["a", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["y"]),
    ]
    return model_of(nodes, [tensor("w", W), tensor("b", B)], **more)


@pytest.mark.parametrize("made", [chain_of, halves_of])
def test_a_convolution_is_replaced_in_place_and_the_rest_keeps_its_bytes(made: Any, tmp_path: Path) -> None:
    model = small(producer_name="someone", doc_string="a model", functions=[])
    before = model.SerializeToString()
    after, path = written(file_of(model), [Replacement(1, made(W, B, padding=1))], tmp_path)
    assert model.SerializeToString() == before
    untouched(model, after, {1}, {"w", "b"})
    assert [after.graph.node[0].op_type, after.graph.node[-1].op_type] == ["Relu", "Sigmoid"]
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["result.onnx"]


def test_nodes_are_named_after_the_convolution() -> None:
    after, fresh = rewritten(file_of(small()), [Replacement(1, halves_of(W, B, padding=1))])
    assert [node.name for node in after.graph.node] == [
        "before", "conv.0.stage0", "conv.0.stage1", "conv.1.stage0", "conv.sum", ""
    ]  # fmt: skip
    assert fresh == {
        "conv.0.stage0.weight", "conv.0.stage1.weight", "conv.0.stage1.bias", "conv.1.stage0.weight"
    }  # fmt: skip


def test_names_are_new_in_the_whole_model(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["conv.stage0.out"], "conv.stage1")], "branch", [],
        [value("conv.stage0.out")],
    )  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("If", ["yes"], ["conv.stage1.bias"], "conv.stage0", then_branch=inner, else_branch=inner),
        helper.make_node("Add", ["conv.stage1.bias", "conv.stage1.weight"], ["y"]),
    ]
    weights = [tensor("w", W), tensor("b", B), tensor("yes", np.array(True)), tensor("conv.stage1.weight", numbers(1))]
    weights.append(tensor("conv.stage0_2.weight", numbers(1)))  # nothing uses it
    model = model_of(nodes, weights)
    after, path = written(file_of(model), [Replacement(0, chain_of(W, B, padding=1))], tmp_path)
    untouched(model, after, {0}, {"w", "b"})
    names = [n.name for n in after.graph.node] + [n.name for n in inner.node]
    values = [name for node in (*after.graph.node, *inner.node) for name in node.output]
    values += [t.name for t in after.graph.initializer] + ["x"]
    assert len(set(names)) == len(names) and len(set(values)) == len(values)
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


def test_nodes_without_names_are_told_apart_by_their_values(tmp_path: Path) -> None:
    second = numbers(4, 8, 3, 3, seed=3)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Conv", ["c", "v"], ["y"])]
    model = model_of(nodes, [tensor("w", W), tensor("v", second)])
    replacements = [Replacement(0, chain_of(W)), Replacement(1, chain_of(second))]
    after, path = written(file_of(model), replacements, tmp_path)
    assert [n.name for n in after.graph.node] == ["c.stage0", "c.stage1", "y.stage0", "y.stage1"]
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


def test_a_weight_that_another_node_uses_stays(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "one", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "w", "b"], ["d"], "two", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "d"], ["y"]),
    ]
    model = model_of(nodes, [tensor("w", W), tensor("b", B)])
    module = chain_of(W, B, padding=1)
    once, path = written(file_of(model), [Replacement(0, module)], tmp_path)
    untouched(model, once, {0}, set())
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))
    twice, path = written(file_of(model), [Replacement(0, module), Replacement(1, module)], tmp_path)
    untouched(model, twice, {0, 1}, {"w", "b"})
    assert len(twice.graph.initializer) == 3  # one module, so its weights are there once
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


def test_a_weight_used_inside_of_a_branch_or_given_out_stays(tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("ReduceMax", ["w"], ["m"], keepdims=0)], "branch", [], [value("m", [])])
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"),
        helper.make_node("If", ["yes"], ["s"], then_branch=inner, else_branch=inner),
        helper.make_node("Add", ["c", "s"], ["y"]),
    ]
    weights = [tensor("w", W), tensor("b", B), tensor("yes", np.array(True))]
    model = model_of(nodes, weights, outputs=[value("y"), value("b", [8])])
    after, path = written(file_of(model), [Replacement(0, chain_of(W, B))], tmp_path)
    untouched(model, after, {0}, set())
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


def test_constants_that_fed_only_the_old_weight_go(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], "k", value=tensor("", W.astype(np.float64))),
        helper.make_node("Cast", ["k"], ["k32"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["k32"], ["w"]),
        helper.make_node("Identity", ["p"], ["b"]),
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Add", ["c", "one"], ["y"]),
    ]
    model = model_of(nodes, [tensor("p", B)])
    model.graph.value_info.extend([value("k", [8, 4, 3, 3], TensorProto.DOUBLE), value("c", ["n", 8, 7, 8])])
    after, path = written(file_of(model), [Replacement(4, chain_of(W, B))], tmp_path)
    untouched(model, after, {0, 1, 2, 3, 4}, {"p"})
    assert [n.op_type for n in after.graph.node] == ["Conv", "Conv", "Constant", "Add"]
    assert [entry.name for entry in after.graph.value_info] == ["c"]
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


def test_weights_computed_from_constants_go_with_all_that_computed_them(tmp_path: Path) -> None:
    flat = np.ascontiguousarray(W.transpose(1, 0, 2, 3))
    nodes = [
        helper.make_node("Transpose", ["flat"], ["t"], perm=[1, 0, 2, 3]),
        helper.make_node("Mul", ["t", "two"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Mul", ["c", "two"], ["y"]),
    ]
    model = model_of(nodes, [tensor("flat", flat), tensor("two", np.array(2, np.float32))])
    after, path = written(file_of(model), [Replacement(2, chain_of(2 * W))], tmp_path)
    untouched(model, after, {0, 1, 2}, {"flat"})
    assert [n.op_type for n in after.graph.node] == ["Conv", "Conv", "Mul"]
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


@pytest.mark.parametrize("bias", [B, None])
def test_a_batch_norm_that_was_folded_goes(bias: Array | None, tmp_path: Path) -> None:
    scale, shift, mean, variance = (numbers(8, seed=seed) for seed in range(10, 14))
    variance = variance**2 + 1
    nodes = [
        helper.make_node("Conv", ["x", "w", *([] if bias is None else ["b"])], ["c"], "conv"),
        helper.make_node("Identity", ["s"], ["s2"]),
        helper.make_node("BatchNormalization", ["c", "s2", "h", "m", "v"], ["y"], "norm", epsilon=1e-3),
        helper.make_node("ReduceMax", ["h"], ["z"]),
    ]
    weights = [tensor("w", W), tensor("s", scale), tensor("h", shift), tensor("m", mean), tensor("v", variance)]
    weights += [] if bias is None else [tensor("b", bias)]
    model = model_of(nodes, weights, outputs=[value("y"), value("z", [1])])
    model.graph.value_info.extend([value("c", ["n", 8, 7, 8]), value("s2", [8])])
    factor = scale / np.sqrt(variance + 1e-3)
    folded = chain_of(W * factor[:, None, None, None], ((0 if bias is None else bias) - mean) * factor + shift)
    after, path = written(file_of(model), [Replacement(0, folded, batch_norm=2)], tmp_path)
    untouched(model, after, {0, 1, 2}, {"w", "b", "s", "m", "v"})
    assert list(after.graph.value_info) == []
    assert [n.op_type for n in after.graph.node] == ["Conv", "Conv", "ReduceMax"]
    assert after.graph.node[1].output[0] == "y"
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


def test_a_batch_norm_that_does_not_stand_alone_behind_is_refused() -> None:
    norm = helper.make_node("BatchNormalization", ["c", "b", "b", "b", "b"], ["y"])
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "conv"), norm, helper.make_node("Relu", ["c"], ["z"])]
    model = model_of(nodes, [tensor("w", W), tensor("b", B)], outputs=[value("y"), value("z", [1])])
    for number in (1, 2, 7):
        with pytest.raises(ExportError, match=f"conv: expected node {number} to be a BatchNormalization"):
            rewritten(file_of(model), [Replacement(0, chain_of(W), batch_norm=number)])


def test_a_batch_norm_whose_statistics_are_used_is_refused() -> None:
    norm = helper.make_node("BatchNormalization", ["c", "b", "b", "b", "b"], ["y", "mean", "var"], training_mode=1)
    model = model_of([helper.make_node("Conv", ["x", "w"], ["c"], "conv"), norm], [tensor("w", W), tensor("b", B)])
    assert rewritten(file_of(model), [Replacement(0, chain_of(W), batch_norm=1)])
    model.graph.output.append(value("mean", [8]))
    with pytest.raises(ExportError, match="expected node 1 to be a BatchNormalization, at work as in inference"):
        rewritten(file_of(model), [Replacement(0, chain_of(W), batch_norm=1)])


def test_a_node_that_makes_something_else_too_stays(tmp_path: Path) -> None:
    both = tensor("both", np.stack([W, W]))
    nodes = [
        helper.make_node("Split", ["both"], ["w5", "rest"], axis=0),
        helper.make_node("Squeeze", ["w5", "axis"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("ReduceMax", ["rest"], ["m"], keepdims=0),
        helper.make_node("Add", ["c", "m"], ["y"]),
    ]
    model = model_of(nodes, [both, tensor("axis", np.array([0], np.int64))])
    after, path = written(file_of(model), [Replacement(2, chain_of(W))], tmp_path)
    untouched(model, after, {1, 2}, {"axis"})
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


@pytest.mark.parametrize("used", [False, True])
def test_a_choice_of_weights_goes_with_them_if_nothing_else_uses_it(used: bool, tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["k"], ["m"])], "branch", [], [value("m", W.shape)])
    other = helper.make_graph([helper.make_node("Neg", ["l"], ["n"])], "other", [], [value("n", W.shape)])
    nodes = [
        helper.make_node("If", ["yes"], ["w"], then_branch=inner, else_branch=other),
        helper.make_node("Conv", ["x", "w"], ["y"], "conv"),
    ]
    outputs = [value("y", ["n", 8, "h", "w"]), *([value("w", W.shape)] if used else [])]
    model = model_of(nodes, [tensor("k", W), tensor("l", W), tensor("yes", np.array(True))], None, outputs)
    after, path = written(file_of(model), [Replacement(1, chain_of(W))], tmp_path)
    untouched(model, after, {1} if used else {0, 1}, set() if used else {"k", "l", "yes"})
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


@pytest.mark.parametrize("ir_version", [3, 7])
def test_weights_that_are_inputs_of_the_graph(ir_version: int, tmp_path: Path) -> None:
    model = small(ir_version=ir_version, opset=8)
    if ir_version == 7:
        model.graph.input.extend([value("w", [8, 4, 3, 3]), value("b", [8])])
    after, path = written(file_of(model), [Replacement(1, chain_of(W, B, padding=1))], tmp_path)
    untouched(model, after, {1}, {"w", "b"})
    new = {t.name for t in after.graph.initializer} if ir_version == 3 else set()
    assert {entry.name for entry in after.graph.input} == {"x"} | new
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


@pytest.mark.parametrize("opset", [1, 6, 7, 13, 22])
def test_branches_are_added_in_every_version_of_the_operators(opset: int) -> None:
    after, _ = rewritten(file_of(small(opset=opset)), [Replacement(1, halves_of(W, B, padding=1))])
    onnx.checker.check_model(after)
    assert [n.op_type for n in after.graph.node][-2] == ("Sum" if opset < 7 else "Add")


def test_metadata_is_added_and_entries_of_its_keys_and_our_own_are_replaced(tmp_path: Path) -> None:
    model = small()
    for key, text in (("ours", "old"), ("theirs", "stays"), ("convrewrite.form", "half"), ("ours", "older")):
        model.metadata_props.add(key=key, value=text)
    path = tmp_path / "result.onnx"
    assert write_rewritten(file_of(model), [], path, {"ours": "new", "more": "1"}) == ()
    after = onnx.load(str(path))
    assert [(e.key, e.value) for e in after.metadata_props] == [("theirs", "stays"), ("ours", "new"), ("more", "1")]
    del model.metadata_props[:], after.metadata_props[:]
    assert after.SerializeToString() == model.SerializeToString()


def test_without_replacements_every_byte_stays_fields_of_later_versions_too(tmp_path: Path) -> None:
    unknown = b"\xfa\x3f\x03new"  # field 1023, of three bytes
    model = onnx.ModelProto.FromString(small().SerializeToString() + unknown)
    model.graph.node[0].MergeFromString(unknown)
    after, path = written(file_of(model), [], tmp_path)
    assert path.read_bytes() == model.SerializeToString()
    assert path.read_bytes().count(unknown) == 2
    after, path = written(file_of(model), [Replacement(1, chain_of(W, B, padding=1))], tmp_path)
    untouched(model, after, {1}, {"w", "b"})
    assert path.read_bytes().count(unknown) == 2


def test_functions_and_training_stay_and_training_counts_as_a_use(tmp_path: Path) -> None:
    function = helper.make_function(
        "local", "Twice", ["v"], ["u"], [helper.make_node("Add", ["v", "v"], ["u"], "conv.stage0")],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"),
        helper.make_node("Twice", ["c"], ["y"], domain="local"),
    ]
    domains = [helper.make_opsetid("local", 1)]
    model = model_of(nodes, [tensor("w", W), tensor("b", B)], domains=domains, functions=[function], ir_version=9)
    info = model.training_info.add()
    info.algorithm.CopyFrom(helper.make_graph([helper.make_node("Neg", ["b"], ["d"])], "step", [], [value("d", [8])]))
    info.update_binding.add(key="w", value="d")
    after, path = written(file_of(model), [Replacement(0, chain_of(W, B))], tmp_path)
    untouched(model, after, {0}, set())
    assert_same(run(model, x=IMAGE), run(path, x=IMAGE))


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_new_weights_have_the_type_of_the_old_one(kind: Any) -> None:
    model = small()
    del model.graph.initializer[:]
    model.graph.initializer.extend([tensor("w", W.astype(kind)), tensor("b", B.astype(kind))])
    after, fresh = rewritten(file_of(model), [Replacement(1, chain_of(W, B, padding=1).double())])
    assert len(fresh) == 3
    want = chain_of(W, B, padding=1)[1].weight.detach().numpy().astype(kind)
    got = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}["conv.stage1.weight"]
    assert got.dtype == kind
    np.testing.assert_array_equal(got, want)


def test_half_precision_computes_the_same(tmp_path: Path) -> None:
    half, kind = np.float16, TensorProto.FLOAT16
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", pads=[1, 1, 1, 1])]
    weights = [tensor("w", W.astype(half)), tensor("b", B.astype(half))]
    model = model_of(nodes, weights, [value("x", ["n", 4, 9, 10], kind)], [value("y", kind=kind)])
    _, path = written(file_of(model), [Replacement(0, chain_of(W, B, padding=1))], tmp_path)
    assert_same(run(model, x=IMAGE.astype(half)), run(path, x=IMAGE.astype(half)), 16)


def test_bfloat16_is_rounded_to_nearest() -> None:
    model = small()
    del model.graph.initializer[:]
    model.graph.initializer.add(name="w", data_type=TensorProto.BFLOAT16, dims=W.shape, raw_data=bytes(2 * W.size))
    model.graph.initializer.add(name="b", data_type=TensorProto.BFLOAT16, dims=B.shape, raw_data=bytes(2 * B.size))
    after, _ = rewritten(file_of(model), [Replacement(1, nn.Sequential(conv_of(W, B, padding=1)))])
    raw = {t.name: t.raw_data for t in after.graph.initializer}["conv.stage0.weight"]
    bits = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16)
    assert torch.equal(bits, torch.from_numpy(W).to(torch.bfloat16).flatten())


def test_numbers_too_large_for_the_type_are_refused() -> None:
    model = small()
    model.graph.initializer[0].CopyFrom(tensor("w", W.astype(np.float16)))
    with pytest.raises(ExportError, match=r"conv\.stage0\.weight: expected numbers within torch\.float16"):
        rewritten(file_of(model), [Replacement(1, conv_of(W * 1e6, B, padding=1))])


def test_what_does_not_fit_is_refused_with_its_place() -> None:
    module = chain_of(W, B, padding=1)
    cases: list[tuple[list[Replacement], str]] = [
        ([Replacement(0, module)], "node 0: expected a Conv or ConvTranspose to replace, found Relu"),
        ([Replacement(9, module)], "node 9: expected a Conv or ConvTranspose to replace, found no node 9"),
        ([Replacement(1, module), Replacement(1, module)], "found Conv of domain '', replaced already"),
        ([Replacement(1, nn.Sequential(nn.ReLU()))], "conv: expected a chain of convolutions in its place, found ReLU"),
        ([Replacement(1, nn.Sequential())], "conv: expected a chain of convolutions in its place, found an empty one"),
        (
            [Replacement(1, SumOfBranches([]))],
            "conv: expected a chain of convolutions in its place, found an empty one",
        ),
        ([Replacement(1, nn.Conv2d(8, 4, 3))], "conv: expected what goes from 4 channels to 8, found 8 and 4"),
        ([Replacement(1, module, pads=(1, 1))], "conv: expected pads before and after on each of 2 axes, found 2"),
    ]
    for replacements, text in cases:
        with pytest.raises(ExportError, match=text):
            rewritten(file_of(small()), replacements)


def test_weights_of_whole_numbers_are_refused() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv")]
    model = model_of(nodes, [tensor("w", np.ones((8, 4, 3, 3), np.int8))])
    with pytest.raises(ExportError, match=r"conv: expected weights of type FLOAT, .*found INT8"):
        rewritten(file_of(model), [Replacement(0, chain_of(W))])
    model.graph.initializer[0].name = "other"
    with pytest.raises(ExportError, match=r"conv: expected weights of type FLOAT, .*found none"):
        rewritten(file_of(model), [Replacement(0, chain_of(W))])


def test_a_sparse_weight_goes_and_a_sparse_one_that_is_used_stays() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "conv"), helper.make_node("Add", ["c", "v"], ["y"])]
    model = model_of(nodes, [])
    for name in ("w", "v"):
        sparse = model.graph.sparse_initializer.add(dims=[8, 4, 3, 3])
        sparse.values.CopyFrom(tensor(name, np.ones(1, np.float32)))
        sparse.indices.CopyFrom(tensor(f"{name}.indices", np.zeros(1, np.int64)))
    model.graph.quantization_annotation.add(tensor_name="w")
    model.graph.quantization_annotation.add(tensor_name="c")
    after, fresh = rewritten(file_of(model), [Replacement(0, chain_of(W))])
    assert len(fresh) == 2
    assert [sparse.values.name for sparse in after.graph.sparse_initializer] == ["v"]
    assert [entry.tensor_name for entry in after.graph.quantization_annotation] == ["c"]


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_that_a_caller_could_give_are_named_where_they_go(ir_version: int, tmp_path: Path) -> None:
    """Below version 4 of the format every initialiser is an input, and nobody gives it."""
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"), helper.make_node("Add", ["c", "s"], ["y"])]
    weights = [tensor("w", W), tensor("b", B), tensor("s", numbers(1))]
    given = [value("x", ["n", 4, 9, 10]), *(value(t.name, list(t.dims)) for t in weights if ir_version > 3)]
    model = model_of(nodes, weights, given, ir_version=ir_version)
    notes = write_rewritten(file_of(model), [Replacement(0, chain_of(W, B))], tmp_path / "result.onnx")
    told = [note for note in notes if "were inputs" in note]
    assert (told[0].endswith("cannot be given any more: w, b") and len(told) == 1) if ir_version > 3 else not told
