"""What hangs on an input that stays as in the example is not written into the graph: whoever uses that may give another."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx_texts import graph, noise
from torch import nn

from convrewrite.graph import find
from convrewrite.onnx_graph import Network, exporter_of, kept_sites, read_network, refused_sites
from convrewrite.onnx_graph.kept import COMPUTED, HELD

PLAIN = "(float[N, 3, 8, 8] image) => (float[N, 8, 8, 8] y)"
WEIGHTS = {"w": (8, 3, 3, 3), "v": (8, 8, 3, 3)}
NORM = {"gamma": (8,), "mean": (8,), "variance": (8,)}
BATCH_NORM = "d = BatchNormalization(c, gamma, beta, mean, variance)"


def network(inputs: str, body: str, outputs: str = "", **weights: tuple[int, ...]) -> Network:
    """A first convolution before ``c``, and what ``body`` makes of that."""
    text = PLAIN.replace("] image)", f"] image{inputs})").replace("] y)", f"] y{outputs})")
    model = graph(f"{text} {{ a = Conv<pads = [1, 1, 1, 1]>(image, w) {body} }}", {**WEIGHTS, **weights})
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type.lower()}_{index}"
    return read_network(model)


def folded(made: Network) -> dict[str, str]:
    """The convolutions of a module that a BatchNorm is folded into."""
    _, _, sites = find(made.module, made.inputs)
    return {site.name: site.batch_norm for site in sites if site.batch_norm is not None}


@pytest.mark.parametrize(("inputs", "body"), [
    (", float[8] b", "y = Conv<pads = [1, 1, 1, 1]>(a, v, b)"),
    (", float alpha", "s = Mul(v, alpha) t = Add(v, s) y = Conv<pads = [1, 1, 1, 1]>(a, t)"),
    (", float[8, 8, 3, 3] k", "y = Conv<pads = [1, 1, 1, 1]>(a, k)"),
    (", float[8, 8, 3, 3] k", "y = ConvTranspose<pads = [1, 1, 1, 1]>(a, k)"),
])  # fmt: skip
def test_a_weight_that_hangs_on_a_held_input_is_not_rewritten(inputs: str, body: str) -> None:
    made = network(inputs, body)
    [(name, reason)] = refused_sites(made.module).items()
    assert name.startswith("conv") and name != "conv_0"
    assert reason == COMPUTED


def test_a_convolution_of_held_inputs_alone_is_told_as_that() -> None:
    made = network(
        ", float[1, 8, 3, 3] still", "b = Conv<pads = [1, 1, 1, 1]>(still, v) c = GlobalMaxPool(b) y = Add(a, c)"
    )
    assert [site.refusal for site in kept_sites(made.module)] == [HELD]


def test_a_batch_norm_that_hangs_on_a_held_input_stays() -> None:
    conv = "c = Conv<pads = [1, 1, 1, 1]>(a, v)"
    fixed = network("", f"{conv} {BATCH_NORM} y = Relu(d)", **NORM, beta=(8,))
    held = network(", float[8] beta", f"{conv} {BATCH_NORM} y = Relu(d)", **NORM)
    assert folded(fixed) == {"conv_1": "batchnormalization_2"}
    assert folded(held) == {}
    assert not refused_sites(held.module), "the convolution before it is rewritten"


@pytest.mark.parametrize(("more", "outputs"), [("dead = Shape(c)", ""), ("", ", float[N, 8, 8, 8] c")])
def test_a_batch_norm_stays_where_its_input_is_used_besides_be_it_for_nothing(more: str, outputs: str) -> None:
    body = f"c = Conv<pads = [1, 1, 1, 1]>(a, v) {BATCH_NORM} {more} y = Relu(d)"
    assert folded(network("", body, outputs, **NORM, beta=(8,))) == {}


def test_what_was_rewritten_follows_inputs_that_were_held(tmp_path: Path) -> None:
    conv = "c = Conv<pads = [1, 1, 1, 1]>(a, v)"
    made = network(", float[8] beta", f"{conv} {BATCH_NORM} dead = Shape(c) y = Relu(d)", **NORM)
    made.module.set_submodule("conv_1", nn.Sequential(made.module.get_submodule("conv_1")))
    path = tmp_path / "out.onnx"
    exporter_of(made.module).rewritten(made.module, made.inputs, path, {})
    original = made.module.meta["convrewrite.translation"].opened.path
    for shift in (0.0, 3.0):
        feed = {"image": noise(2, 3, 8, 8).numpy(), "beta": np.full(8, shift, np.float32)}
        expected, found = (ort.InferenceSession(str(one)).run(None, feed)[0] for one in (original, path))
        assert np.allclose(expected, found, atol=1e-5)


def test_shapes_and_pads_may_hang_on_held_inputs() -> None:
    model = graph(
        f"{PLAIN.replace('] image)', '] image, int64[8] pads)')} {{ a = Pad(image, pads) y = Conv(a, w) }}", WEIGHTS
    )
    made = read_network(model, {"pads": torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])})
    assert not refused_sites(made.module)
