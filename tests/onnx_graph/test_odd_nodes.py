"""Nodes that are seldom written as these are: each graph is read, and computes what onnxruntime does."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_texts import graph, made_of, noise, require_equal, told
from torch import nn

from convrewrite.errors import UsageError
from convrewrite.onnx_graph import read_network
from convrewrite.onnx_graph.ordering import put_in_order
from convrewrite.onnx_graph.portable import PortableGraph
from convrewrite.onnx_graph.translating import translation_of
from convrewrite.onnx_graph.views import names_used

X = noise(2, 3, 8, 8)

SEQUENCE = """
(float[N, 3, 8, 8] x) => (float[N, 8, 8, 8] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    none = SequenceEmpty()
    one = SequenceInsert(none, a)
    b = Relu(a)
    two = SequenceInsert(one, b)
    y = ConcatFromSequence<axis = 1>(two)
}
"""

WHOLE = """
(float[N, 3, 8, 8] x) => (float[N, 8, 8, 2] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    last = Transpose<perm = [0, 2, 3, 1]>(a)
    whole = Cast<to = 7>(last)
    product = MatMul(whole, chosen)
    y = Cast<to = 1>(product)
}
"""

LEFT_OUT = """
(float[N, 3, 8, 8] x) => (float[N, 4, 4, 4] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
    y = Dropout(p)
}
"""

EMPTY = """
(float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y, int64[N, 0, 8, 8] none) {
    y = Conv<pads = [1, 1, 1, 1]>(x, w)
    whole = Cast<to = 7>(y)
    none = Slice(whole, from, from, along)
}
"""


def test_a_sequence_that_begins_with_nothing(tmp_path: Path) -> None:
    module = made_of(graph(SEQUENCE, {"w": (4, 3, 3, 3)}), tmp_path, X)
    assert told(module).opaque == {"SequenceEmpty": 1, "SequenceInsert": 2, "ConcatFromSequence": 1}
    require_equal(module, noise(3, 3, 8, 8))


def test_a_product_of_whole_numbers_with_a_constant_is_no_layer(tmp_path: Path) -> None:
    chosen = np.array([[1, 0], [0, 1], [2, 0], [0, 3]], np.int64)
    module = made_of(graph(WHOLE, {"w": (4, 3, 3, 3), "chosen": chosen}), tmp_path, X * 9)
    assert told(module).opaque == {}
    assert [part for part in module.modules() if isinstance(part, nn.Linear)] == []
    require_equal(module, noise(3, 3, 8, 8) * 9)


def test_large_whole_numbers_come_out_of_the_file_and_of_its_parts() -> None:
    """onnxruntime gives them in the other one of two types that numpy calls uint64."""
    text = "(float[N, 3, 8, 8] x) => (uint64[N, 8, 6, 6] y) { a = Conv(x, w) b = Abs(a) c = Cast<to = 13>(b) "
    text += "d = SequenceConstruct(c, c) y = SequenceAt(d, first) }"
    network = read_network(graph(text, {"w": (8, 3, 3, 3), "first": np.array(1)}))
    opened = translation_of(network.module).opened
    assert opened.session(X)["y"].dtype == network.module(X)["y"].dtype == torch.uint64
    assert torch.equal(opened.session(X)["y"], network.module(X)["y"])


def test_outputs_that_are_left_out_by_an_empty_name_are_not_there(tmp_path: Path) -> None:
    model = graph(LEFT_OUT, {"w": (4, 3, 3, 3)})
    for node in model.graph.node[1:]:
        node.output.append("")
    module = made_of(model, tmp_path, X)
    assert told(module).opaque == {}
    assert any(isinstance(part, nn.MaxPool2d) for part in module.modules())
    require_equal(module, noise(3, 3, 8, 8))


def test_an_attribute_that_is_a_type(tmp_path: Path) -> None:
    model = graph("(float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) { a = Conv<pads = [1, 1, 1, 1]>(x, w) }",
                  {"w": (4, 3, 3, 3)})  # fmt: skip
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    model.graph.node.append(helper.make_node("Optional", ["a"], ["maybe"], type=kind))
    model.graph.node.append(helper.make_node("OptionalGetElement", ["maybe"], ["y"]))
    module = made_of(model, tmp_path, X)
    assert told(module).opaque == {"Optional": 1, "OptionalGetElement": 1}
    require_equal(module, noise(3, 3, 8, 8))


def test_a_value_beside_the_file_that_is_no_weight(tmp_path: Path) -> None:
    (tmp_path / "seven").write_bytes(np.float32(7).tobytes())
    value = TensorProto(data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, entry in (("location", "seven"), ("offset", "0"), ("length", "4")):
        value.external_data.add(key=key, value=entry)
    model = graph("""
    (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w)
        sizes = Shape(a)
        sevens = ConstantOfShape(sizes)
        y = Add(a, sevens)
    }
    """, {"w": (4, 3, 3, 3)})  # fmt: skip
    model.graph.node[2].attribute.append(helper.make_attribute("value", value))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    module = read_network(tmp_path / "model.onnx", X).module
    assert told(module).opaque == {}
    require_equal(module, noise(3, 3, 8, 8))
    with pytest.raises(UsageError, match="expected weights in the file itself"):
        PortableGraph.of(module, (X,))


def test_whole_numbers_of_which_there_are_none_are_the_same(tmp_path: Path) -> None:
    ends = {"from": np.zeros(1, np.int64), "along": np.ones(1, np.int64)}
    module = made_of(graph(EMPTY, {"w": (4, 3, 3, 3), **ends}), tmp_path, X)
    assert module(X)["none"].shape == (2, 0, 8, 8)


def test_a_weight_that_a_branch_stores_by_its_entries_is_its_own() -> None:
    values = numpy_helper.from_array(np.ones(2, np.float32), "own")
    places = numpy_helper.from_array(np.array([0, 2]), "places")
    branch = helper.make_graph([helper.make_node("Add", ["outer", "own"], ["sum"])], "b", [],
                               [onnx.ValueInfoProto(name="sum")])  # fmt: skip
    branch.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3]))
    choice = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    assert set(names_used(choice)) == {"flag", "outer"}


DISORDER = """
(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
    y = Conv<pads = [1, 1, 1, 1]>(e, v)
    e = If(bright) <
        then_branch = yes () => (float[N, 4, 6, 6] p) { p = Relu(d) },
        else_branch = no () => (float[N, 4, 6, 6] q) { q = Neg(d) }
    >
    d = Mul(c, k)
    c = Conv<pads = [1, 1, 1, 1]>(x, w)
    bright = Greater(mean, zero)
    mean = ReduceMean<keepdims = 0>(x)
    k = Exp(zero)
    zero = Constant<value_float = 0.0>()
}
"""


def test_nodes_that_stand_before_those_whose_values_they_take(tmp_path: Path) -> None:
    path = tmp_path / "disorder.onnx"
    onnx.save(graph(DISORDER, {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)}), str(path))
    network = read_network(path, noise(1, 4, 6, 6))
    assert any("nodes stand in the file before others" in note for note in network.notes)
    translation = told(network.module)
    assert translation.opaque == {"If": 1}
    nodes = translation.opened.file.model.graph.node
    assert " ".join(n.op_type for n in nodes) == "ReduceMean Constant Greater Conv Exp Mul If Conv"
    assert {nodes[index].op_type for index in translation.nodes.values()} == {"Conv"}
    require_equal(network.module, noise(1, 4, 6, 6, seed=3))


def test_nodes_in_order_stay_where_they_are() -> None:
    model = graph(DISORDER, {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)})
    assert put_in_order(model.graph)
    before = model.SerializeToString(deterministic=True)
    assert not put_in_order(model.graph)
    assert model.SerializeToString(deterministic=True) == before
