"""Whole graphs as modules: seen to compute the same, whatever a maker of operators says; batches; inputs and outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_texts import classifier, graph, made_of, noise, opened, require_equal, told
from torch import Tensor, nn

from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.inputs import parameter_names
from convrewrite.onnx_graph import batch_of, building, is_graph
from convrewrite.onnx_graph.examples import example_of_graph
from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.kept import WITHOUT_EXAMPLES
from convrewrite.onnx_graph.opaque import Region
from convrewrite.onnx_graph.translating import translate


def regions(module: nn.Module) -> list[Region]:
    return [part for part in module.modules() if isinstance(part, Region)]


def test_a_classifier_is_layers_alone(tmp_path: Path) -> None:
    module = made_of(classifier(), tmp_path)
    translation = told(module)
    assert (translation.opaque, translation.blocks_gradients, translation.notes) == ({}, False, ())
    assert (translation.batch, translation.module_batch, translation.judged.names) == (None, None, ("logits",))
    assert translation.sizes["c"] == (1, 32, 8, 8)
    assert is_graph(module)
    assert not is_graph(nn.Conv2d(1, 1, 1))
    assert parameter_names(module) == ("image",)
    assert not any(part.training for part in module.modules())
    for count in (1, 5):
        require_equal(module, noise(count, 3, 16, 16, seed=count))


def test_the_state_of_the_layers_is_that_of_the_graph(tmp_path: Path) -> None:
    module = made_of(classifier(), tmp_path)
    expected = {tensor.name for tensor in told(module).opened.file.model.graph.initializer}
    assert len(list(module.parameters())) == len(expected) - 2, "all but mean and variance"
    assert {"stem.weight", "first.weight", "second.bias", "head.weight"} <= dict(module.named_parameters()).keys()


def test_gradients_reach_every_layer(tmp_path: Path) -> None:
    module = made_of(classifier(), tmp_path)
    module(noise(2, 3, 16, 16))["logits"].square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters())


FREE = """
(float[N, 3, H, W] image) => (float[N, 4, H2, W2] y) {
    a = Conv<pads = [1, 1, 1, 1]>(image, w)
    s = Shape(a)
    two = Constant<value_ints = [1, 1, 2, 2]>()
    t = Mul(s, two)
    y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(a, , , t)
}
"""


def test_sizes_that_the_graph_computes_follow_the_input(tmp_path: Path) -> None:
    module = made_of(graph(FREE, {"w": (4, 3, 3, 3)}), tmp_path, noise(1, 3, 8, 8))
    for size in ((8, 8), (10, 6), (5, 12)):
        require_equal(module, noise(3, 3, *size))


def lying(view: NodeView) -> Callable[..., Any]:
    return lambda x: torch.relu(x) + 0.01


def flattering(view: NodeView) -> Callable[..., Any]:
    """Right for numbers as they come first, wrong for others."""
    return lambda x: torch.relu(x) if float(x.max()) > 1.0 else x


def failing(view: NodeView) -> Callable[..., Any]:
    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    return fail


def misshapen(view: NodeView) -> Callable[..., Any]:
    return lambda x: torch.relu(x)[:1]


def unwilling(view: NodeView) -> None:
    return None


@pytest.mark.parametrize("maker", [lying, flattering, failing, misshapen, unwilling])
def test_an_operator_that_computes_something_else_is_run_by_onnxruntime(
    maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "OPERATORS", {**building.OPERATORS, "Relu": maker})
    example = noise(1, 3, 16, 16)
    text = "(float[N, 3, 16, 16] x) => (float[N, 4, 14, 14] y) { a = Relu(x) b = Conv(a, w) c = Relu(b) y = Neg(c) }"
    model = graph(text, {"w": (4, 3, 3, 3)})
    # The second run has half of these numbers: below the limit at which the flattering one turns wrong.
    module = made_of(model, tmp_path, example / example.max() * 1.2)
    assert "Relu" in told(module).opaque
    assert "Neg" not in told(module).opaque, "others are not"
    assert regions(module)[0].operators == ("Relu",)
    require_equal(module, noise(3, 3, 16, 16, seed=4))


def test_an_operator_with_too_few_outputs_is_run_by_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "OPERATORS", {**building.OPERATORS, "Split": lambda view: lambda x: (x[:, :2],)})
    text = "(float[N, 4] x) => (float[N, 2] y) { a, b = Split<axis = 1>(x) c = Relu(b) d = Neg(a) y = Add(c, d) }"
    module = made_of(graph(text), tmp_path)
    assert told(module).opaque == {"Split": 1}
    require_equal(module, noise(3, 4))


def test_a_layer_that_computes_something_else_is_run_by_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(view: NodeView) -> Any:
        layers = real(view)
        if layers is not None and view.op_type == "Conv":
            with torch.no_grad():
                layers[-1].weight[0, 0, 0, 0] += 0.5
        return layers

    real = building.layers_of
    monkeypatch.setattr(building, "layers_of", other)
    module = made_of(classifier(), tmp_path)
    assert told(module).opaque == {"Conv": 3}
    require_equal(module, noise(2, 3, 16, 16))


def test_operators_that_fail_only_together_leave_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that agrees where it is tried, and not in the module, is found at the end; then all operators are regions."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.relu(x) if self.calls <= 3 else -x

    monkeypatch.setattr(building, "OPERATORS", {**building.OPERATORS, "Relu": lambda view: Moody()})
    module = made_of(classifier(), tmp_path)
    assert told(module).opaque == {"Relu": 3, "GlobalAveragePool": 1, "Flatten": 1}
    assert len(told(module).nodes) == 4
    require_equal(module, noise(2, 3, 16, 16))


def test_a_graph_that_gives_other_values_at_every_call_is_refused(tmp_path: Path) -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y) { r = RandomNormalLike(x) a = Add(x, r) y = Relu(a) }")
    with pytest.raises(ModelLoadError, match="a node may give other values at every call"):
        made_of(model, tmp_path)


def test_several_inputs_and_outputs_go_by_their_names(tmp_path: Path) -> None:
    text = "(float[N, 4] a, float[N, 4] b) => (float[N, 4] d, float[N, 4] s, float[N, 4] b) { d = Sub(a, b) s = Add(d, b) }"
    module = made_of(graph(text), tmp_path)
    a, b = noise(3, 4), noise(3, 4, seed=1)
    found = module(a, b)
    assert list(found) == ["d", "s", "b"]
    assert torch.equal(found["b"], b)
    require_equal(module, a, b)


def test_an_input_that_nothing_uses_is_still_taken(tmp_path: Path) -> None:
    module = made_of(graph("(float[N, 4] a, float[N, 4] unused) => (float[N, 4] y) { y = Relu(a) }"), tmp_path)
    assert parameter_names(module) == ("a", "unused")
    require_equal(module, noise(2, 4), noise(2, 4, seed=1))


def test_nodes_that_no_output_hangs_on_are_left_out(tmp_path: Path) -> None:
    text = "(float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) { a = Conv(x, w) b = Det(a) y = Relu(x) }"
    model = graph(text, {"w": (4, 3, 3, 3)})
    module = made_of(model, tmp_path)
    assert not told(module).opaque
    assert not told(module).nodes
    require_equal(module, noise(2, 3, 8, 8))


def test_outputs_that_are_the_same_for_every_input_are_not_judged(tmp_path: Path) -> None:
    text = "(float[N, 4] x) => (float[N, 4] y, float[4] c, float[4] w) { y = Add(x, w) c = Mul(w, w) }"
    module = made_of(graph(text, {"w": (4,)}), tmp_path)
    assert told(module).judged.names == ("y",)
    assert list(module(noise(2, 4))) == ["y"]
    assert (told(module).batch, told(module).notes) == (None, ())
    with pytest.raises(UsageError, match="expected outputs that hang on the inputs, found none"):
        made_of(graph("(float[N, 4] x) => (float[4] c) { c = Mul(w, w) }", {"w": (4,)}), tmp_path)


ONE = "(float[1, 3, 8, 8] x) => (float[1, 4] y) { a = Conv(x, w) b = GlobalAveragePool(a) y = Flatten(b) }"
RESHAPED = """
(float[1, 3, 8, 8] x) => (float[1, 144] y) { a = Conv(x, w) s = Constant<value_ints = [1, 144]>() y = Reshape(a, s) }
"""
FIRST = "(float[N, 4] x) => (float[4, N] y) { a = Relu(x) y = Transpose<perm = [1, 0]>(a) }"
MIXED = "(float[N, 4] x) => (float[N, 4] y) { m = ReduceMean<axes = [0]>(x) y = Sub(x, m) }"


def test_a_graph_of_one_example_may_be_a_module_of_any_number(tmp_path: Path) -> None:
    module = made_of(graph(ONE, {"w": (4, 3, 3, 3)}), tmp_path)
    assert (told(module).batch, batch_of(module)) == (1, None)
    assert told(module).notes == ("the graph takes 1 example at a time",)
    both = module(torch.cat([noise(1, 3, 8, 8), noise(1, 3, 8, 8, seed=1)]))["y"]
    alone = [told(module).opened.session(noise(1, 3, 8, 8, seed=seed))["y"] for seed in (0, 1)]
    assert torch.allclose(both, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_graph_that_holds_on_to_its_number_of_examples_is_a_module_of_so_many(tmp_path: Path) -> None:
    module = made_of(graph(RESHAPED, {"w": (4, 3, 3, 3)}), tmp_path)
    assert (told(module).batch, batch_of(module)) == (1, 1)
    require_equal(module, noise(1, 3, 8, 8, seed=2))


SUMMED = "(float[N, 4] x) => (float[N, 4] y) { axis = Constant<value_int = 0>() a = CumSum(x, axis) y = Neg(a) }"


@pytest.mark.parametrize("text", [FIRST, MIXED, SUMMED], ids=["batch_behind", "mean_of_all", "sum_of_those_before"])
def test_outputs_without_one_row_for_each_example_fix_the_number(text: str, tmp_path: Path) -> None:
    module = made_of(graph(text), tmp_path, noise(3, 4))
    assert (told(module).batch, batch_of(module)) == (3, 3)
    assert told(module).notes[0].startswith("the graph is run on 3 examples at a time, as not every output")
    require_equal(module, noise(3, 4, seed=1))


def test_a_graph_of_two_examples(tmp_path: Path) -> None:
    model = graph(ONE.replace("[1,", "[2,"), {"w": (4, 3, 3, 3)})
    module = made_of(model, tmp_path)
    assert told(module).batch == 2
    assert told(module).notes == ("the graph takes 2 examples at a time",)
    require_equal(module, noise(2, 3, 8, 8))


SIGNAL = """
(float[T] x) => (float[1, 4] y) {
    s = Constant<value_ints = [1, 1, -1]>() a = Reshape(x, s) b = Conv(a, w) c = GlobalAveragePool(b) y = Flatten(c)
}
"""
IMAGE = """
(float[3, 8, 8] x) => (float[1, 4] y) {
    s = Constant<value_ints = [1, 3, 8, 8]>() a = Reshape(x, s) b = Conv(a, w) c = GlobalAveragePool(b) y = Flatten(c)
}
"""


@pytest.mark.parametrize(
    ("text", "weight", "example"), [(SIGNAL, (4, 1, 1), (1,)), (SIGNAL, (4, 1, 3), (9,)), (IMAGE, (4, 3, 3, 3), (3, 8, 8))]
)  # fmt: skip
def test_without_an_axis_of_examples_convolutions_stay(
    text: str, weight: tuple[int, ...], example: tuple[int, ...], tmp_path: Path
) -> None:
    module = made_of(graph(text, {"w": weight}), tmp_path, noise(*example))
    assert list(told(module).refused.values()) == [WITHOUT_EXAMPLES]
    assert told(module).notes == (), "a place or a channel is no example"
    require_equal(module, noise(*example, seed=1))


def test_integer_and_boolean_values_pass(tmp_path: Path) -> None:
    text = """
    (int64[N, 4] index, bool[N, 4] mask) => (float[N, 4, 3] y, int64[N, 4] i, bool[N, 4] m) {
        a = Gather(table, index)
        axis = Constant<value_ints = [2]>()
        b = Unsqueeze(mask, axis)
        zero = Constant<value_float = 0.5>()
        y = Where(b, a, zero)
        i = Add(index, index)
        m = Not(mask)
    }
    """
    module = made_of(graph(text, {"table": (5, 3)}), tmp_path)
    index = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    require_equal(module, index, index > 2)


def test_an_output_that_is_only_converted_to_double_precision(tmp_path: Path) -> None:
    text = "(float[N, 3, 8, 8] x) => (double[N, 4, 4, 4] y) { a = Conv(x, w) b = Conv(a, v) y = Cast<to = 11>(b) }"
    module = made_of(graph(text, {"w": (4, 3, 3, 3), "v": (4, 4, 3, 3)}), tmp_path)
    assert module(noise(2, 3, 8, 8))["y"].dtype == torch.float64


def test_a_shape_of_the_example_that_the_graph_refuses_is_told(tmp_path: Path) -> None:
    source = opened(graph("(float[N, M] x) => (float[N, 5] y) { y = MatMul(x, w) }", {"w": (6, 5)}), tmp_path)
    with pytest.raises(UsageError, match="pass --input NAME=SHAPE"):
        example_of_graph(source.session)
    with pytest.raises(ModelLoadError, match="cannot run it on these inputs"):
        translate(source, (noise(1, 7),))


def test_values_beyond_numbers_do_not_hide_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite entries are equal, and the others are measured against the largest finite one."""
    model = graph("(float[N, 4] x) => (float[N, 4] y) { a = Relu(x) y = Log(a) }")
    require_finite = made_of(model, tmp_path, torch.tensor([[1.0, -1.0, 2.0, 0.5]]))
    found = require_finite(torch.tensor([[1.0, -1.0, 2.0, 0.5]]))["y"]
    assert np.isneginf(found.numpy()).tolist() == [[False, True, False, False]]
    monkeypatch.setattr(
        building, "OPERATORS", {**building.OPERATORS, "Log": lambda view: lambda x: torch.log(x) * 1.01}
    )
    assert told(made_of(model, tmp_path, torch.tensor([[1.0, -1.0, 2.0, 0.5]]))).opaque == {"Log": 1}
