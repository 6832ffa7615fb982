"""Regions that onnxruntime runs inside of a module: what they take and give, where gradients end, and their copies."""

import copy
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_texts import drawn, graph, made_of, noise, require_equal, told
from torch import fx, nn

from convrewrite.errors import ModelLoadError
from convrewrite.modules import private_copy
from convrewrite.onnx_graph import building
from convrewrite.onnx_graph.opaque import Region

BRANCHES = """
(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    mean = ReduceMean<keepdims = 0>(a)
    zero = Constant<value_float = 0.0>()
    bright = Greater(mean, zero)
    b = If(bright) <
        then_branch = yes () => (float[N, 4, 6, 6] p) { p = Relu(a) },
        else_branch = no () => (float[N, 4, 6, 6] q) { q = Neg(a) }
    >
    y = Conv<pads = [1, 1, 1, 1]>(b, v)
}
"""

LOOP = """
(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    trips = Constant<value_int = 3>()
    going = Constant<value = bool {1}>()
    b = Loop(trips, going, a) <
        body = body (int64 step, bool before, float[N, 4, 6, 6] state) => (bool after, float[N, 4, 6, 6] next) {
            after = Identity(before)
            s = Mul(state, scale)
            next = Sub(s, x)
        }
    >
    y = Conv<pads = [1, 1, 1, 1]>(b, v)
}
"""

BRIGHT = """
(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    most = ReduceMax<keepdims = 0>(x)
    trips = Cast<to = 7>(most)
    going = Constant<value = bool {1}>()
    y = Loop(trips, going, a) <
        body = body (int64 step, bool before, float[N, 4, 6, 6] state) => (bool after, float[N, 4, 6, 6] next) {
            after = Identity(before)
            next = Neg(state)
        }
    >
}
"""
"""A loop that goes on as long as the largest number says."""

SEQUENCE = """
(float[N, 4, 6, 6] x) => (float[N, 8, 6, 6] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    b = Relu(a)
    parts = SequenceConstruct(a, b)
    one = Constant<value_int = 1>()
    last = SequenceAt(parts, one)
    c = Conv<pads = [1, 1, 1, 1]>(last, v)
    more = SequenceInsert(parts, c)
    zero = Constant<value_int = 0>()
    first = SequenceAt(more, zero)
    two = Constant<value_int = 2>()
    third = SequenceAt(more, two)
    y = Concat<axis = 1>(first, third)
}
"""

WEIGHTS = {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)}


def regions(module: nn.Module) -> list[Region]:
    return [part for part in module.modules() if isinstance(part, Region)]


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


@pytest.fixture
def branches(tmp_path: Path) -> fx.GraphModule:
    return made_of(graph(BRANCHES, WEIGHTS), tmp_path)


def test_an_if_takes_the_branch_that_the_numbers_say(branches: fx.GraphModule) -> None:
    assert "If" in told(branches).opaque
    assert len(convolutions(branches)) == 2
    for sign in (1, -1):
        require_equal(branches, sign * noise(1, 4, 6, 6))
    # Both branches were at work, as a negative sum is told from a positive one.
    pushed = [branches(noise(1, 4, 6, 6) + shift)["y"] for shift in (3.0, -3.0)]
    assert not torch.allclose(pushed[0], pushed[1])


def test_a_loop_takes_values_from_around_it(tmp_path: Path) -> None:
    module = made_of(graph(LOOP, WEIGHTS | {"scale": np.array(0.5, np.float32)}), tmp_path)
    [region] = regions(module)
    assert region.operators == ("Loop",)
    assert set(region.inputs) == {"x", "a"}, "what the body reads from outside is given too"
    require_equal(module, noise(2, 4, 6, 6))


def test_functions_of_the_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["p", "q"], ["r"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["r"], ["s"]),
    ]  # fmt: skip
    text = "(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) { a = own.Block(x, w) b = own.Block(a, v) y = Relu(b) }"
    model = graph(text, WEIGHTS)
    model.functions.append(
        helper.make_function("own", "Block", ["p", "q"], ["s"], nodes, [helper.make_opsetid("", 17)])
    )
    module = made_of(model, tmp_path)
    assert told(module).opaque["Block"] == 2
    require_equal(module, noise(3, 4, 6, 6))


def test_a_shape_from_outside_has_its_length_in_a_scan(tmp_path: Path) -> None:
    text = """
    (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w)
        sizes = Shape(a)
        shape = Slice(sizes, one, four)
        sums = ReduceSum<keepdims = 0>(a, axes)
        end, y = Scan<num_scan_inputs = 1, body = body (before, row) => (after, part) {
            after = Identity(before)
            moved = Add(row, before)
            part = Reshape(moved, shape)
        }>(sums, a)
    }
    """
    rows = {"one": np.array([1]), "four": np.array([4]), "axes": np.arange(4)}
    module = made_of(graph(text, {"w": (4, 4, 3, 3)} | rows), tmp_path, noise(1, 4, 6, 6))
    assert told(module).opaque == {"Scan": 1}, "the number of axes of what it gives must be known to onnxruntime"
    require_equal(module, noise(1, 4, 6, 6, seed=1))


def test_sizes_from_outside_have_their_length_in_a_resize(tmp_path: Path) -> None:
    text = """
    (float[N, 4, 6, 6] x) => (float[N, 4, 9, 9] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w)
        shape = Shape(a)
        head = Slice(shape, zero, two)
        sizes = Concat<axis = 0>(head, larger)
        y = Resize<mode = "cubic", coordinate_transformation_mode = "tf_crop_and_resize">(a, roi, , sizes)
    }
    """
    rows = {"zero": np.array([0]), "two": np.array([2]), "larger": np.array([9, 9])}
    roi = {"roi": np.array([0, 0, 0.1, 0.1, 1, 1, 0.9, 0.9], np.float32)}
    module = made_of(graph(text, {"w": (4, 4, 3, 3)} | rows | roi), tmp_path)
    assert told(module).opaque == {"Resize": 1}, "onnxruntime must know for how many axes there are sizes"
    require_equal(module, noise(3, 4, 6, 6))


def test_a_region_that_does_not_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_given: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Region, "forward", refused)
    with pytest.raises(
        ModelLoadError, match=r"found that what onnxruntime runs of them \(.*If.*\) does not run apart .*"
    ):
        made_of(graph(BRANCHES, WEIGHTS), tmp_path)


def test_a_sequence_passes_from_region_to_region(tmp_path: Path) -> None:
    module = made_of(graph(SEQUENCE, WEIGHTS), tmp_path)
    assert len(regions(module)) == 2, "the second convolution stands between them"
    assert len(convolutions(module)) == 2
    require_equal(module, noise(2, 4, 6, 6))


def test_half_precision_goes_through_a_region(tmp_path: Path) -> None:
    text = (
        BRANCHES.replace("float[", "float16[")
        .replace("zero = C", "f = C")
        .replace("bright = ", "zero = Cast<to = 10>(f) bright = ")
    )
    half = {name: drawn(shape, seed, np.float16) for seed, (name, shape) in enumerate(WEIGHTS.items())}
    module = made_of(graph(text, half), tmp_path)
    assert "If" in told(module).opaque
    [region] = regions(module)
    given = {"a": noise(1, 4, 6, 6), "bright": torch.tensor(True)}
    assert region(*(given[name] for name in region.inputs)).dtype == torch.float32
    require_equal(module, noise(2, 4, 6, 6, dtype=torch.float16), tolerance=8e-3)


def test_gradients_end_at_a_region_and_reach_what_is_behind(branches: fx.GraphModule) -> None:
    assert told(branches).blocks_gradients
    assert any("gradients end there" in note for note in told(branches).notes)
    branches(noise(2, 4, 6, 6))["y"].square().sum().backward()
    before, behind = convolutions(branches)
    assert before.weight.grad is None
    assert behind.weight.grad is not None
    assert bool(behind.weight.grad.any())


def test_a_region_that_gives_whole_numbers_ends_no_gradients(tmp_path: Path) -> None:
    text = """
    (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w)
        s = own.Sizes(a)
        m = ReduceMax<keepdims = 0>(s)
        f = Cast<to = 1>(m)
        y = Mul(a, f)
    }
    """
    model = graph(text, {"w": (4, 4, 3, 3)})
    nodes = [helper.make_node("Shape", ["p"], ["r"])]
    model.functions.append(helper.make_function("own", "Sizes", ["p"], ["r"], nodes, [helper.make_opsetid("", 17)]))
    module = made_of(model, tmp_path)
    assert told(module).opaque["Sizes"] == 1
    assert not told(module).blocks_gradients
    assert not any("gradients" in note for note in told(module).notes)
    module(noise(2, 4, 6, 6))["y"].square().sum().backward()
    assert convolutions(module)[0].weight.grad is not None


def test_copies_share_the_session(branches: fx.GraphModule) -> None:
    for copied in (copy.deepcopy(branches), private_copy(branches, (noise(1, 4, 6, 6),))):
        for ours, theirs in zip(regions(branches), regions(copied), strict=True):
            assert ours is not theirs
            assert ours._session is theirs._session
        for mine, other in zip(convolutions(branches), convolutions(copied), strict=True):
            assert mine.weight is not other.weight
            assert torch.equal(mine.weight, other.weight)
        assert told(copied).opened is told(branches).opened
        require_equal(copied, noise(2, 4, 6, 6))


def test_a_region_does_not_change_what_it_is_given(branches: fx.GraphModule) -> None:
    x = noise(2, 4, 6, 6)
    before = x.clone()
    branches(x)
    assert torch.equal(x, before)
    first = branches(x)["y"].detach().clone()
    branches(x + 1)
    assert torch.equal(branches(x)["y"], first), "what was given before is not overwritten"


def test_a_session_cannot_be_pickled(branches: fx.GraphModule) -> None:
    with pytest.raises(TypeError, match=r"cannot pickle"):
        pickle.dumps(regions(branches)[0])


def test_nodes_in_a_row_are_one_region(tmp_path: Path) -> None:
    text = """
    (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
        a = own.Half(x)
        b = own.Half(a)
        c = Conv<pads = [1, 1, 1, 1]>(b, w)
        d = own.Half(x)
        y = Add(c, d)
    }
    """
    model = graph(text, {"w": (4, 4, 3, 3)})
    nodes = [
        helper.make_node("Constant", [], ["q"], value_float=0.5), helper.make_node("Mul", ["p", "q"], ["r"]),
    ]  # fmt: skip
    model.functions.append(helper.make_function("own", "Half", ["p"], ["r"], nodes, [helper.make_opsetid("", 17)]))
    module = made_of(model, tmp_path)
    assert [region.operators for region in regions(module)] == [("Half", "Half"), ("Half",)]
    assert repr(regions(module)[0]) == "Region(Half, Half)"
    require_equal(module, noise(4, 4, 6, 6))


def test_the_graph_is_not_gone_through_for_every_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[onnx.NodeProto] = []
    names_used = building.names_used
    monkeypatch.setattr(building, "names_used", lambda node: calls.append(node) or names_used(node))
    steps = "".join(f"b{i} = own.Twice(a{i}) a{i + 1} = Relu(b{i}) " for i in range(8))
    model = graph(f"(float[N, 2] x) => (float[N, 2] y) {{ a0 = Neg(x) {steps} y = Neg(a8) }}")
    nodes, opsets = [helper.make_node("Add", ["v", "v"], ["o"])], [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Twice", ["v"], ["o"], nodes, opsets))
    module = made_of(model, tmp_path, noise(1, 2))
    assert len(regions(module)) == 8
    assert len(calls) <= 2 * len(model.graph.node), "once for all, and once in its own region"


def test_a_region_that_does_not_end_on_some_inputs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PATIENCE", 0.01)
    module = made_of(graph(BRIGHT, {"w": (4, 4, 3, 3)}), tmp_path, noise(1, 4, 6, 6))
    require_equal(module, noise(2, 4, 6, 6, seed=1))
    with pytest.raises(
        ModelLoadError, match=r"\(Loop\): expected that onnxruntime runs it on these inputs within 0\.3 s"
    ):
        module(noise(1, 4, 6, 6) * 1e15)


def test_values_that_onnxruntime_cannot_show_go_from_no_region_to_another(tmp_path: Path) -> None:
    text = """
    (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w)
        b = own.Twice(a)
        c = Cast<to = 16>(b)
        d = own.Twice(a)
        e = Relu(d)
        f = Cast<to = 1>(c)
        g = Add(e, f)
        y = Conv<pads = [1, 1, 1, 1]>(g, v)
    }
    """
    model = graph(text, {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)})
    nodes, opsets = [helper.make_node("Add", ["v", "v"], ["o"])], [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Twice", ["v"], ["o"], nodes, opsets))
    module = made_of(model, tmp_path)
    assert [region.operators for region in regions(module)] == [("Twice", "Cast", "Twice"), ("Twice", "Cast", "Cast")]
    assert told(module).opaque == {"Twice": 2, "Cast": 2}
    assert len(told(module).nodes) == 2
    for count in (1, 3):
        require_equal(module, noise(count, 4, 6, 6, seed=count))


@pytest.mark.parametrize("kind", ["FLOAT8E5M2", "UINT4"])
def test_quantised_values_of_types_that_numpy_lacks(tmp_path: Path, kind: str) -> None:
    text = """
    (float[N, 4, 6, 6] x) => (float[N, 4, 4, 4] y) {
        a = QuantizeLinear(x, s, z)
        b = DequantizeLinear(a, s, z)
        y = Conv(b, w)
    }
    """
    model = graph(text, {"w": (4, 4, 3, 3), "s": np.array(0.25, np.float32)}, opset=21, ir=10)
    model.graph.initializer.append(helper.make_tensor("z", getattr(TensorProto, kind), [], [0]))
    module = made_of(model, tmp_path)
    assert told(module).opaque == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert len(told(module).nodes) == 1
    require_equal(module, noise(2, 4, 6, 6))


def test_an_optional_value_that_would_go_from_region_to_region_is_refused(tmp_path: Path) -> None:
    text = """
    (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
        o = Optional(x)
        a = Celu(x)
        b = own.Twice(a)
        c = Relu(b)
        d = OptionalGetElement(o)
        y = Add(c, d)
    }
    """
    model = graph(text)
    nodes, opsets = [helper.make_node("Add", ["v", "v"], ["o"])], [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Twice", ["v"], ["o"], nodes, opsets))
    with pytest.raises(
        ModelLoadError, match=r"made\.onnx: expected that onnxruntime runs OptionalGetElement apart .*optional type"
    ):
        made_of(model, tmp_path, noise(1, 4, 6, 6))
