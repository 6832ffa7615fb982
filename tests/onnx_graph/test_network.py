"""From a file to a module with an example, and what of the file is no part of that module."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_texts import classifier, drawn, graph, made_of, noise, opened, require_equal, told
from torch import nn

from convrewrite.conv import Cost
from convrewrite.errors import ModelLoadError, TraceError, UsageError
from convrewrite.inputs import parameter_names
from convrewrite.onnx_graph import (
    exporter_of,
    hidden_cost,
    kept_sites,
    open_onnx,
    read_network,
    refused_sites,
    require_end,
)
from convrewrite.onnx_graph.observing import Observer
from convrewrite.onnx_graph.translating import translate

BRANCHES = """
(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    mean = ReduceMean<keepdims = 0>(a)
    bright = Greater(mean, zero)
    b = If(bright) <
        then_branch = yes () => (float[N, 4, 6, 6] p) { p = Conv<pads = [1, 1, 1, 1]>(a, v) },
        else_branch = no () => (float[N, 4, 6, 6] q) { q = Neg(a) }
    >
    y = Conv<pads = [1, 1, 1, 1]>(b, w)
}
"""

WEIGHTS = {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3), "zero": np.array(0, np.float32)}

HELD = """
(float[N, 3, 8, 8] image, int64 rate, float[3, 1, 1] shift) => (float[N, 4, 6, 6] y) {
    one = Cast<to = 1>(rate)
    a = Add(image, shift)
    b = Add(a, one)
    y = Conv(b, w)
}
"""


def test_a_path_a_model_and_an_opened_file_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(classifier(), str(path))
    networks = [read_network(source) for source in (str(path), path, classifier(), open_onnx(path))]
    x = noise(2, 3, 16, 16)
    expected = networks[0].module(x)["logits"]
    for network in networks:
        assert torch.equal(network.module(x)["logits"], expected)
        assert torch.equal(network.inputs[0], networks[0].inputs[0])
        assert network.module.code == networks[0].module.code


def test_the_notes_say_what_was_assumed() -> None:
    text = "(float[1, 4, H, W] x) => (float[1, 4, P, Q] y) { a = Conv(x, w) y = Relu(a) }"
    network = read_network(graph(text, {"w": (4, 4, 3, 3)}))
    assert len(network.notes) == 2
    assert "free axes of inputs got an example size: x as 1x4x224x224" in network.notes[0]
    assert network.notes[1] == "the graph takes 1 example at a time"
    given = read_network(graph(text, {"w": (4, 4, 3, 3)}), noise(1, 4, 9, 9))
    assert given.notes == network.notes[1:]


def test_inputs_without_an_axis_of_examples_are_held(tmp_path: Path) -> None:
    example = {"image": noise(1, 3, 8, 8), "rate": torch.tensor(2), "shift": noise(3, 1, 1, seed=3)}
    network = read_network(graph(HELD, {"w": (4, 3, 3, 3)}), example)
    assert parameter_names(network.module) == ("image",)
    assert torch.equal(network.inputs[0], example["image"])
    assert len(network.inputs) == 1
    x = noise(3, 3, 8, 8, seed=5)
    expected = told(network.module).opened.session(x, example["rate"], example["shift"])["y"]
    assert torch.allclose(network.module(x)["y"], expected, rtol=0, atol=1e-5)
    assert any("rate" in note and "shift" in note for note in network.notes), network.notes


LONG = """
(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    s = Shape<start = 0, end = 1>(x)
    n = Squeeze(s)
    three = Constant<value_int = 3>()
    one = Constant<value_int = 1>()
    many = Constant<value_int = 1000000000000000>()
    more = GreaterOrEqual(n, three)
    trips = Where(more, many, one)
    going = Constant<value = bool {1}>()
    y = Loop(trips, going, a) <
        body = body (int64 step, bool before, float[N, 4, 6, 6] state) => (bool after, float[N, 4, 6, 6] next) {
            after = Identity(before)
            next = Neg(state)
        }
    >
}
"""
"""One turn for one example or two, more than anybody waits for with three."""


def test_a_batch_on_which_a_graph_does_not_end_is_told_before_it_is_worked_on() -> None:
    network = read_network(graph(LONG, {"w": (4, 4, 3, 3)}))
    require_end(network.module, [])
    require_end(network.module, [(noise(2, 4, 6, 6),), (noise(3, 4, 6, 6),)])
    translation = told(network.module)
    hasty = replace(translation, opened=replace(translation.opened, seconds=0.3))
    network.module.meta["convrewrite.translation"] = hasty
    with pytest.raises(
        ModelLoadError, match=r"runs on these inputs within 0\.3 s .* does not end in that time; .*--timeout"
    ):
        require_end(network.module, [(noise(3, 4, 6, 6),)])
    require_end(read_network(classifier()).module, [(noise(1, 1),)])  # nothing in it can go on, so it is not run


def test_a_graph_that_does_not_end_on_two_examples_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Observer, "try_out", lambda *_given: None)
    source = opened(graph(LONG.replace("value_int = 3>", "value_int = 2>"), {"w": (4, 4, 3, 3)}), tmp_path)
    with pytest.raises(ModelLoadError, match=r"made\.onnx: expected that onnxruntime runs it .* within 0\.3 s"):
        translate(replace(source, seconds=0.3), (noise(1, 4, 6, 6),))


def test_temporary_files_without_room_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(classifier(), tmp_path)

    def without_room(_path: Path, _content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", without_room)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\); .* in TMPDIR"):
        translate(source, (noise(1, 3, 16, 16),))


def test_names_of_inputs_that_are_not_there_are_told() -> None:
    with pytest.raises(UsageError, match=r"names of the graph's inputs \(image\), found picture"):
        read_network(classifier(), {"picture": noise(1, 3, 16, 16)})


def test_nothing_of_a_plain_graph_is_beside_its_module(tmp_path: Path) -> None:
    module = made_of(classifier(), tmp_path)
    assert kept_sites(module) == ()
    assert refused_sites(module) == {}
    assert hidden_cost(module) == Cost(0, 0)
    assert (kept_sites(nn.ReLU()), refused_sites(nn.ReLU()), hidden_cost(nn.ReLU())) == ((), {}, Cost(0, 0))


def test_a_convolution_in_a_branch_is_told_and_counted(tmp_path: Path) -> None:
    module = made_of(graph(BRANCHES, WEIGHTS), tmp_path)
    [kept] = kept_sites(module)
    assert kept.refusal is not None
    assert "inside of the If" in kept.refusal
    assert kept.cost == Cost(144, 144 * 36)
    assert hidden_cost(module).macs == 144 * 36
    assert len(told(module).nodes) == 2


def test_a_convolution_that_stays_has_another_name_than_all_sites() -> None:
    text = "(float[N, 4, 8, 8] x) => (float[N, 4, 6, 6] y) { conv_1 = Conv(x, w) y = Conv(x, v) }"
    module = read_network(graph(text, {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)})).module
    assert list(told(module).nodes) == ["conv_1"]
    assert [site.name for site in kept_sites(module)] == ["conv_1_2"]


def test_a_convolution_that_is_never_run_costs_no_macs(tmp_path: Path) -> None:
    text = "(float[N, 4, 8, 8] x) => (float[N, 4, 6, 6] y) { y = Conv(x, w) b = Conv(y, v) c = Relu(b) }"
    module = made_of(graph(text, {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)}), tmp_path)
    [kept] = kept_sites(module)
    assert kept.refusal is not None
    assert "never run" in kept.refusal
    assert hidden_cost(module) == Cost(144, 0)


def test_a_convolution_behind_a_choice_is_told(tmp_path: Path) -> None:
    text = """
    (float[1, 4, 8, 8] x) => (float[K, 4, 4, 4] y) {
        a = Conv(x, w)
        rows = Reshape(a, pairs)
        sums = ReduceMax<axes = [1, 2], keepdims = 0>(rows)
        zero = Constant<value_float = 1.0>()
        chosen = Greater(sums, zero)
        b = Compress<axis = 0>(rows, chosen)
        c = Unsqueeze(b, last)
        y = Conv(c, v)
    }
    """
    numbers = {"pairs": np.array([4, 6, 6], np.int64), "last": np.array([1], np.int64)}
    model = graph(text, {"w": (4, 4, 3, 3), "v": (4, 1, 3, 3), **numbers})
    module = made_of(model, tmp_path, noise(1, 4, 8, 8))
    [kept] = kept_sites(module)
    assert kept.refusal is not None
    assert "chosen by numbers" in kept.refusal


def test_weights_that_only_regions_hold_are_counted(tmp_path: Path) -> None:
    text = BRANCHES.replace("y = Conv<pads = [1, 1, 1, 1]>(b, w)", "y = Relu(b)")
    module = made_of(graph(text, WEIGHTS), tmp_path)
    assert hidden_cost(module) == Cost(145, 144 * 36)  # and the limit that the condition compares with


def test_numbers_count_wherever_the_file_stores_them() -> None:
    model = graph(BRANCHES, {"zero": np.array(0, np.float32)})
    held = numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "v")
    model.graph.node[3].attribute[0].g.initializer.append(held)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=held))
    constants = [
        helper.make_node("Constant", [], ["k"], value_floats=[1.0, 2.0]),
        helper.make_node("Add", ["p", "k"], ["r"]),
    ]
    model.functions.append(helper.make_function("own", "Never", ["p"], ["r"], constants, model.opset_import))
    network = read_network(model)
    assert sum(parameter.numel() for parameter in network.module.parameters()) == 2 * 144
    assert hidden_cost(network.module) == Cost(144 + 1 + 2, 144 * 36)


def test_weights_that_other_nodes_use_too_stay_for_these() -> None:
    model = graph(BRANCHES.replace("(a, v)", "(a, w)"), {"w": (4, 4, 3, 3), "zero": np.array(0, np.float32)})
    network = read_network(model)
    assert sum(parameter.numel() for parameter in network.module.parameters()) == 2 * 144
    assert hidden_cost(network.module) == Cost(144 + 1, 144 * 36)
    assert "layers of the graph share weights" in network.notes[-2]
    assert "other nodes of the graph use weights" in network.notes[-1]
    assert all(": 144 more than are in the file" in note for note in network.notes[-2:])


def test_weights_that_are_made_of_others_that_stay() -> None:
    text = "(float[N, 4, 8, 8] x) => (float[N, 4, 6, 6] y, float[4, 4, 3, 3] w) { v = Neg(w) y = Conv(x, v) }"
    for given in (
        text,
        text.replace("] w)", "] v)"),
        text.replace("v = Neg(w)", "u = Abs(w) v = Neg(u)").replace("] w)", "] u)"),
    ):
        network = read_network(graph(given, {"w": (4, 4, 3, 3)}))
        assert hidden_cost(network.module) == Cost(144, 0)
        assert ": 144 more than are in the file" in network.notes[-1]


def test_what_operators_hold_counts_and_statistics_do_not(tmp_path: Path) -> None:
    norm = "BatchNormalization"
    nodes = f"a = Conv(x, w) b = {norm}(a, g, h, m, v) c = Conv(b, w) d = {norm}(c, g, h, m, v) y = Mul(d, k)"
    text = f"(float[N, 4, 8, 8] x) => (float[N, 4, 4, 4] y) {{ {nodes} }}"
    per_channel = dict.fromkeys(("g", "h", "m", "v"), (4,))
    module = made_of(graph(text, {"w": (4, 4, 3, 3), "k": (1, 4, 1, 1)} | per_channel), tmp_path)
    assert sum(parameter.numel() for parameter in module.parameters()) == 2 * (144 + 8)
    assert hidden_cost(module) == Cost(4, 0)


def test_a_kernel_that_layers_share_is_counted_once(tmp_path: Path) -> None:
    text = "(float[N, 4, 8, 8] x) => (float[N, 4, 2, 2] y) { a = Conv(x, w, c) b = Conv(a, w, c) y = Conv(b, w) }"
    module = made_of(graph(text, {"w": (4, 4, 3, 3), "c": (4,), "unused": (5,)}), tmp_path)
    assert sum(parameter.numel() for parameter in module.parameters()) == 3 * 144 + 2 * 4
    assert hidden_cost(module) == Cost(5, 0)
    note = read_network(graph(text, {"w": (4, 4, 3, 3), "c": (4,), "unused": (5,)})).notes[-1]
    assert note.startswith("layers of the graph share weights")
    assert ": 292 more than are in the file" in note


def test_a_convolution_of_a_function_is_told(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["p", "q"], ["r"])]
    text = "(float[N, 4, 6, 6] x) => (float[N, 4, 2, 2] y) { a = own.Block(x, w) y = Conv(a, w) }"
    model = graph(text, {"w": (4, 4, 3, 3)})
    model.functions.append(
        helper.make_function("own", "Block", ["p", "q"], ["r"], nodes, [helper.make_opsetid("", 17)])
    )
    module = made_of(model, tmp_path)
    [kept] = kept_sites(module)
    assert kept.refusal is not None
    assert "inline the functions" in kept.refusal
    assert kept.cost == Cost(144, 144 * 16)


def test_a_convolution_that_onnxruntime_runs_is_told(tmp_path: Path) -> None:
    text = "(float[N, 4, 6, 6] x) => (float[N, 4, 4, 4] y) { m = ReduceMean<keepdims = 0>(x) v = Mul(w, m) y = Conv(x, v) }"
    module = made_of(graph(text, {"w": (4, 4, 3, 3)}), tmp_path)
    [kept] = kept_sites(module)
    assert kept.refusal is not None
    assert "its weights are computed from the model's inputs" in kept.refusal


LAID_OUT = """
(float[N, 16, 6, 6] x) => (float[N, 16, 4, 4] y) {
    a = com.microsoft.nchwc.Conv<kernel_shape = [3, 3]>(x, w)
    b = com.microsoft.nchwc.ReorderOutput<channels = 16>(a)
    y = REST(b)
}
"""


def laid_out(rest: str, tmp_path: Path) -> Path:
    """A file as onnxruntime writes it after all its optimisations."""
    model = graph(LAID_OUT.replace("y = REST(b)", rest), {"w": (16, 16, 3, 3), "v": (16, 16, 1, 1)})
    model.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    onnx.save(model, str(tmp_path / "laid_out.onnx"))
    return tmp_path / "laid_out.onnx"


def test_convolutions_of_unknown_geometry_are_told(tmp_path: Path) -> None:
    network = read_network(laid_out("y = Conv(b, v)", tmp_path), noise(1, 16, 6, 6))
    assert kept_sites(network.module) == ()
    [note] = [note for note in network.notes if "geometry" in note]
    assert ": 1 Conv: laid out by onnxruntime for one processor; " in note


def test_a_graph_of_convolutions_of_unknown_geometry_alone_is_refused_with_the_reason(tmp_path: Path) -> None:
    network = read_network(laid_out("y = Relu(b)", tmp_path), noise(1, 16, 6, 6))
    with pytest.raises(TraceError, match=r"laid_out\.onnx: .* found 1 Conv: laid out by onnxruntime"):
        kept_sites(network.module)


def test_a_quantised_kernel_is_a_layer_that_stays(tmp_path: Path) -> None:
    text = "(float[N, 4, 6, 6] x) => (float[N, 4, 4, 4] y) { v = DequantizeLinear(w, s) y = Conv(x, v) }"
    whole = np.round(drawn((4, 4, 3, 3)) * 50).astype(np.int8)
    module = made_of(graph(text, {"w": whole, "s": np.array(0.02, np.float32)}), tmp_path)
    [(name, reason)] = refused_sites(module).items()
    assert isinstance(module.get_submodule(name), nn.Conv2d)
    assert "quantised already" in reason
    assert kept_sites(module) == ()
    require_equal(module, noise(2, 4, 6, 6))


def test_weights_that_an_operator_of_another_domain_computes_are_written_in_their_type(tmp_path: Path) -> None:
    text = "(float[N, 4, 6, 6] x) => (float[N, 4, 4, 4] y) { k = com.microsoft.Gelu(w) y = Conv(x, k) }"
    model = graph(text, {"w": (4, 4, 3, 3)})
    model.graph.node[1].name = "conv"
    network = read_network(model)
    network.module.set_submodule("conv", nn.Sequential(network.module.get_submodule("conv")))
    path = tmp_path / "out.onnx"
    exporter_of(network.module).rewritten(network.module, network.inputs, path, {})
    x = noise(2, 4, 6, 6)
    expected = told(network.module).opened.session(x)["y"]
    assert torch.allclose(open_onnx(path).session(x)["y"], expected, rtol=0, atol=1e-6)
