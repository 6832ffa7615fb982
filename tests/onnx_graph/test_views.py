"""Nodes as their makers see them, and what of a graph is constant."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_texts import graph

from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.views import Constants, as_tensor, names_used, view_of

IF = """
(float[N, 4] x, bool c) => (float[N, 4] y) {
    a = Relu(x)
    y = If(c) <
        then_branch = yes () => (float[N, 4] p) { q = Add(a, w) p = Relu(q) },
        else_branch = no () => (float[N, 4] x2) {
            x2 = If(c) <then_branch = deep () => (float[N, 4] r) { r = Sub(x, v) }, else_branch = out () => (float[N, 4] a) { }>
        }
    >
}
"""


def file(model: onnx.ModelProto) -> OnnxFile:
    return OnnxFile(model, Path(), "here")


def test_a_node_uses_what_the_graphs_inside_of_it_take_from_outside() -> None:
    model = graph(IF, {"w": (4,), "v": (4,)})
    assert set(names_used(model.graph.node[1])) == {"c", "a", "w", "x", "v"}
    assert list(names_used(model.graph.node[0])) == ["x"]


def test_constants_are_what_no_input_reaches() -> None:
    nodes = "a = Mul(w, w) r = RandomNormalLike(w) s = Shape(x) b = Add(a, r) c = Add(x, a) y = Relu(c)"
    text = f"(float[N, 4] x) => (float[N, 4] y) {{ {nodes} }}"
    found = Constants(file(graph(text, {"w": (4,)})), ["x"])
    assert found.names == {"w", "a"}
    assert found.initialiser("w") is not None
    assert found.initialiser("a") is None
    assert found.tensor("a") is None
    found.learn({"a": np.array([1.0], np.float32), "y": np.array([2.0])})
    assert found.tensor("a") == torch.tensor([1.0])
    assert found.array("y") is None
    assert found.tensor("x") is None


def test_what_takes_only_the_type_of_an_input_is_constant() -> None:
    nodes = "zero = Constant<value_float = 0.0>() a = CastLike(zero, x) b = CastLike(x, w) y = Add(b, a)"
    model = graph(f"(float[N, 4] x, float[4] z) => (float[N, 4] y) {{ {nodes} }}", {"w": (4,)})
    assert Constants(file(model), ["x", "z"]).names == {"w", "zero", "a"}
    held = Constants(file(model), ["z"], {"x": torch.zeros(1, 4)})
    assert held.from_held == {"x", "b", "y"}


def test_an_initialiser_that_is_given_at_every_run_is_none() -> None:
    model = graph("(float[N, 4] x, float[4] w) => (float[N, 4] y) { y = Mul(x, w) }", {"w": (4,)})
    assert Constants(file(model), ["x", "w"]).names == set()
    assert Constants(file(model), ["x"]).names == {"w"}


def test_a_node_with_graphs_inside_is_constant_only_if_these_are() -> None:
    text = """
    (float[N, 4] x) => (float[N, 4] y) {
        a = If(c) <then_branch = p () => (float[4] q) { q = Relu(GIVEN) }, else_branch = r () => (float[4] s) { s = Neg(w) }>
        y = Add(x, a)
    }
    """
    weights = {"w": np.ones(4, np.float32), "c": np.array(True)}
    assert "a" in Constants(file(graph(text.replace("GIVEN", "w"), weights)), ["x"]).names
    assert "a" not in Constants(file(graph(text.replace("GIVEN", "x"), weights)), ["x"]).names


def test_half_precision_is_seen_as_float32() -> None:
    assert as_tensor(np.ones(2, np.float16)).dtype == torch.float32  # type: ignore[union-attr]


def test_a_tensor_is_a_copy() -> None:
    array = np.zeros(3, np.float32)
    tensor = as_tensor(array)
    assert tensor is not None
    array[0] = 1
    assert float(tensor[0]) == 0


@pytest.mark.parametrize("value", [[np.ones(2)], None, "text", np.array(["text"], object), np.ones(2, np.complex64)])
def test_what_torch_does_not_have_is_no_tensor(value: object) -> None:
    assert as_tensor(value) is None


def test_a_view_has_all_that_a_maker_asks_for() -> None:
    kernel = numpy_helper.from_array(np.ones((2, 2), np.float16), "t")
    node = helper.make_node(
        "Thing", ["x", "", "w"], ["y", "", "z"], f=0.5, i=3, s="text", fs=[0.5], si=["a", "b"], n=[1, 2], t=kernel,
        g=graph("() => (float[4] y) { y = Relu(w) }").graph,
    )  # fmt: skip
    model = graph("(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }", {"w": (3, 5)}, opset=13)
    view = view_of(node, file(model), Constants(file(model), ["x"]), {"x": 2})
    assert view is not None
    assert (view.op_type, view.opset, view.present, view.outputs) == (
        "Thing", 13, (True, False, True), (True, False, True),
    )  # fmt: skip
    assert view.ranks == (2, None, 2)
    assert [one is None for one in view.constants] == [True, True, False]
    attributes = dict(view.attributes)
    assert torch.equal(attributes.pop("t"), torch.ones(2, 2))
    assert attributes == {"f": 0.5, "i": 3, "s": "text", "fs": [0.5], "si": ["a", "b"], "n": [1, 2]}


def test_operators_of_other_domains_have_it_before_their_names() -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    constants = Constants(file(model), ["x"])
    names = [
        view.op_type
        for domain in ("", "ai.onnx", "com.microsoft")
        if (view := view_of(helper.make_node("Gelu", ["x"], ["y"], domain=domain), file(model), constants, {}))
        is not None
    ]
    assert names == ["Gelu", "Gelu", "com.microsoft::Gelu"]


def test_a_constant_that_torch_does_not_have_gives_no_view() -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    model.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], [b"a"]))
    node = helper.make_node("Thing", ["x", "words"], ["y"])
    assert view_of(node, file(model), Constants(file(model), ["x"]), {}) is None


def sparse(name: str, places: list[int] | list[list[int]]) -> onnx.SparseTensorProto:
    """Two numbers of a tensor of shape (2, 3)."""
    values = helper.make_tensor(name, TensorProto.FLOAT, [2], [1.5, -2.0])
    shape = [2] if isinstance(places[0], int) else [2, 2]
    indices = helper.make_tensor("", TensorProto.INT64, shape, np.array(places).ravel())
    return helper.make_sparse_tensor(values, indices, [2, 3])


@pytest.mark.parametrize("places", [[1, 5], [[0, 1], [1, 2]]])
def test_sparse_constants_have_all_their_numbers(places: list[int] | list[list[int]]) -> None:
    model = graph("(float[N, 3] x) => (float[N, 3] y) { c = Identity(s) y = Add(x, c) }")
    model.graph.sparse_initializer.append(sparse("s", places))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["t"], sparse_value=sparse("", places)))
    found = Constants(file(model), ["x"])
    expected = torch.tensor([[0, 1.5, 0], [0, 0, -2.0]])
    assert found.names == {"s", "t", "c"}
    for name in ("s", "t"):
        tensor = found.tensor(name)
        assert tensor is not None and torch.equal(tensor, expected)


def test_constants_that_hang_on_held_inputs_are_told_apart() -> None:
    text = "(float[N, 4] x, float h) => (float[N, 4] y) { a = Mul(w, h) b = Neg(a) c = Neg(w) d = Mul(b, c) y = Mul(x, d) }"
    found = Constants(file(graph(text, {"w": (4,)})), ["x"], {"h": torch.tensor(2.0)})
    assert found.names == {"w", "h", "a", "b", "c", "d"}
    assert found.from_held == {"h", "a", "b", "d"}
