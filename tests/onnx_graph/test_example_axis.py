"""Which inputs of a graph have examples along their first axis: those that it states so, whatever stands first."""

import pytest
import torch
from onnx_texts import graph

from convrewrite.onnx_graph import ExampleAxis

BODY = "{ r = Reshape(x, s) a = Conv(r, w) m = ReduceMean<keepdims = 0>(z) y = Add(a, m) }"
WEIGHTS = {"w": (4, 3, 3, 3)}


@pytest.mark.parametrize(("inputs", "expected"), [
    ("float[100, 4] z, float[N, 3, 8, 8] x", ["x"]),
    ("float[N, 3, 8, 8] x, float[1, 4] z", ["x"]),
    ("float[N, 4] z, float[N, 3, 8, 8] x", ["z", "x"]),
    ("float[100, 4] z, float[1, 3, 8, 8] x", ["x"]),
    ("float[2, 4] z, float[2, 3, 8, 8] x", ["z", "x"]),
    ("float z, float[1, 192] x", ["x"]),
    ("float[8] z, float[N] x", ["x"]),
])  # fmt: skip
def test_the_graph_states_which_inputs_have_examples(inputs: str, expected: list[str]) -> None:
    model = graph(f"({inputs}) => (float[N, 4, 6, 6] y) {BODY}", WEIGHTS)
    assert list(ExampleAxis.of(model).names) == expected


def test_inputs_of_other_lengths_are_held() -> None:
    model = graph(f"(float[A, 4] z, float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) {BODY}", WEIGHTS)
    given = {"z": torch.zeros(7, 4), "x": torch.zeros(1, 3, 8, 8)}
    own, held = ExampleAxis.of(model).divided(given)
    assert (list(own), list(held)) == (["x"], ["z"])
    own, held = ExampleAxis.of(model).divided(given | {"z": torch.zeros(1, 4)})
    assert (list(own), list(held)) == (["z", "x"], [])


def test_an_input_of_any_number_of_axes_may_have_examples() -> None:
    model = graph(f"(float[100, 4] z, float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) {BODY}", WEIGHTS)
    model.graph.input[1].type.tensor_type.ClearField("shape")
    assert ExampleAxis.of(model).names == ("x",)
