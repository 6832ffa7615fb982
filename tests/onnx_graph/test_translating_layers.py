"""Layers made of nodes: what onnxruntime gives is what they give, at other sizes and batches than the example's too."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_texts import drawn, graph, made_of, noise, require_equal, told
from torch import Tensor, nn

IMAGE = "(float[N, 4, H, W] x) => (float[N, C, P, Q] y)"


def image(body: str, opset: int = 17, **weights: tuple[int, ...]) -> onnx.ModelProto:
    return graph(f"{IMAGE} {{ {body} }}", weights, opset)


CONVOLUTIONS = {
    "plain": ("y = Conv<pads = [1, 1, 1, 1]>(x, w)", {"w": (8, 4, 3, 3)}),
    "bias": ("y = Conv(x, w, b)", {"w": (8, 4, 3, 3), "b": (8,)}),
    "valid": ('y = Conv<auto_pad = "VALID">(x, w)', {"w": (8, 4, 3, 3)}),
    "strided": ("y = Conv<strides = [2, 1], pads = [1, 0, 1, 0]>(x, w)", {"w": (8, 4, 3, 3)}),
    "dilated": ("y = Conv<dilations = [2, 2], pads = [2, 2, 2, 2]>(x, w)", {"w": (8, 4, 3, 3)}),
    "grouped": ("y = Conv<group = 2>(x, w)", {"w": (8, 2, 3, 3)}),
    "depthwise": ("y = Conv<group = 4>(x, w)", {"w": (8, 1, 3, 3)}),
    "uneven": ("y = Conv<pads = [0, 1, 2, 3]>(x, w)", {"w": (8, 4, 3, 3)}),
    "same_upper": ('y = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w)', {"w": (8, 4, 3, 3)}),
    "same_lower": ('y = Conv<auto_pad = "SAME_LOWER", strides = [2, 2]>(x, w)', {"w": (8, 4, 3, 3)}),
    "same_even": ('y = Conv<auto_pad = "SAME_UPPER">(x, w)', {"w": (8, 4, 2, 4)}),
    "transposed": ("y = ConvTranspose<strides = [2, 2]>(x, w, b)", {"w": (4, 8, 3, 3), "b": (8,)}),
    "transposed_groups": ("y = ConvTranspose<group = 2>(x, w)", {"w": (4, 3, 3, 3)}),
    "output_padding": (
        "y = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]>(x, w)", {"w": (4, 8, 3, 3)},
    ),
    "transposed_uneven": ("y = ConvTranspose<strides = [2, 2], pads = [1, 1, 0, 0]>(x, w)", {"w": (4, 8, 3, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_layer(name: str, tmp_path: Path) -> None:
    body, weights = CONVOLUTIONS[name]
    module = made_of(image(body, **weights), tmp_path, noise(1, 4, 9, 10))
    assert [type(part) for part in module.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    assert not told(module).opaque
    assert list(told(module).nodes.values()) == [0]
    for size in ((9, 10), (8, 7), (12, 13)):
        require_equal(module, noise(3, 4, *size, seed=1))


def test_zeros_before_a_convolution_are_remembered(tmp_path: Path) -> None:
    uneven = told(made_of(image(CONVOLUTIONS["uneven"][0], w=(8, 4, 3, 3)), tmp_path))
    assert list(uneven.pads.values()) == [((0, 1, 2, 3), "")]
    same = told(made_of(image(CONVOLUTIONS["same_upper"][0], w=(8, 4, 3, 3)), tmp_path))
    assert list(same.pads.values()) == [((), "SAME_UPPER")]
    assert not told(made_of(image(CONVOLUTIONS["plain"][0], w=(8, 4, 3, 3)), tmp_path)).pads


@pytest.mark.parametrize(
    "body",
    [
        "y = ConvTranspose<strides = [2, 2], pads = [0, 0, 1, 1]>(x, w)",
        "y = ConvTranspose<strides = [2, 2], output_shape = [20, 20]>(x, w)",
    ],
)
def test_a_transposed_convolution_that_torch_does_not_have_is_run_by_onnxruntime(body: str, tmp_path: Path) -> None:
    module = made_of(image(body, w=(4, 8, 3, 3)), tmp_path, noise(1, 4, 10, 10))
    assert told(module).opaque == {"ConvTranspose": 1}
    assert not told(module).nodes
    require_equal(module, noise(2, 4, 10, 10, seed=1))


@pytest.mark.parametrize(("axes", "kind"), [(1, nn.Conv1d), (3, nn.Conv3d)])
def test_other_numbers_of_axes(axes: int, kind: type[nn.Module], tmp_path: Path) -> None:
    free = ", ".join("ABC"[:axes])
    model = graph(
        f"(float[N, 4, {free}] x) => (float[N, 8, {free}] y) {{ y = Conv(x, w) }}", {"w": (8, 4, *[3] * axes)}
    )
    module = made_of(model, tmp_path, noise(1, 4, *[7] * axes))
    assert sum(isinstance(part, kind) for part in module.modules()) == 1
    require_equal(module, noise(2, 4, *[6] * axes))


@pytest.mark.parametrize(("sizes", "kind"), [
    ((), nn.BatchNorm1d), ((5,), nn.BatchNorm1d), ((5, 6), nn.BatchNorm2d), ((3, 4, 5), nn.BatchNorm3d),
])  # fmt: skip
def test_batch_norm_of_every_rank(sizes: tuple[int, ...], kind: type[nn.Module], tmp_path: Path) -> None:
    text = ", ".join(["N", "4", *map(str, sizes)])
    body = f"(float[{text}] x) => (float[{text}] y) {{ y = BatchNormalization<epsilon = 0.01>(x, s, b, m, v) }}"
    module = made_of(graph(body, dict.fromkeys("sbmv", (4,))), tmp_path)
    [norm] = [part for part in module.modules() if isinstance(part, kind)]
    assert norm.eps == pytest.approx(0.01)
    require_equal(module, noise(3, 4, *sizes))


def test_a_batch_norm_in_training_is_no_layer(tmp_path: Path) -> None:
    body = "(float[N, 4] x) => (float[N, 4] y) { y, p, q = BatchNormalization<training_mode = 1>(x, s, b, m, v) }"
    module = made_of(graph(body, dict.fromkeys("sbmv", (4,))), tmp_path, noise(6, 4))
    assert not any(isinstance(part, nn.BatchNorm1d) for part in module.modules())


GEMMS = {
    "transposed": ("y = Gemm<transB = 1>(x, w, b)", (5, 6), (5,)),
    "scaled": ("y = Gemm<alpha = 0.5, beta = 2.0>(x, w, b)", (6, 5), (5,)),
    "one_bias": ("y = Gemm(x, w, b)", (6, 5), (1,)),
    "row": ("y = Gemm(x, w, b)", (6, 5), (1, 5)),
    "none": ("y = Gemm(x, w)", (6, 5), None),
    "product": ("y = MatMul(x, w)", (6, 5), None),
}


@pytest.mark.parametrize("name", GEMMS)
def test_a_dense_layer(name: str, tmp_path: Path) -> None:
    body, shape, bias = GEMMS[name]
    weights = {"w": drawn(shape, 1)} | ({} if bias is None else {"b": drawn(bias, 2)})
    module = made_of(graph(f"(float[N, 6] x) => (float[N, 5] y) {{ {body} }}", weights), tmp_path)
    assert sum(isinstance(part, nn.Linear) for part in module.modules()) == 1
    require_equal(module, noise(4, 6))


@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = MatMul(w, x)"])
def test_a_product_with_a_constant_of_more_axes(body: str, tmp_path: Path) -> None:
    model = graph(f"(float[N, 3, 4, 4] x) => (float[N, 3, 4, 4] y) {{ {body} }}", {"w": (3, 4, 4)})
    module = made_of(model, tmp_path)
    assert not told(module).opaque
    require_equal(module, noise(2, 3, 4, 4))


def test_layers_of_one_kernel_have_the_kernel_each(tmp_path: Path) -> None:
    body = "a = Conv<pads = [1, 1, 1, 1]>(x, w) b = Relu(a) y = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(b, w)"
    module = made_of(image(body, w=(4, 4, 3, 3)), tmp_path)
    first, second = (part for part in module.modules() if isinstance(part, nn.Conv2d))
    assert torch.equal(first.weight, second.weight)
    assert sorted(told(module).nodes.values()) == [0, 2]
    require_equal(module, noise(2, 4, 9, 9))


BEHIND = {
    "identity": ("v = Identity(w)", {"w": (8, 4, 3, 3)}),
    "cast": ("v = Cast<to = 1>(w)", {"w": drawn((8, 4, 3, 3), dtype=np.float64)}),
    "arithmetic": ("s = Mul(w, w) v = Sub(s, w)", {"w": (8, 4, 3, 3)}),
    "reshaped": ("v = Reshape(w, shape)", {"w": (8, 36), "shape": np.array([8, 4, 3, 3])}),
    "dequantised": (
        "v = DequantizeLinear(w, scale)",
        {
            "w": np.arange(-144, 144).reshape(8, 4, 3, 3).clip(-128, 127).astype(np.int8),
            "scale": np.array(0.02, np.float32),
        },
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_kernel_that_nodes_compute(name: str, tmp_path: Path) -> None:
    body, weights = BEHIND[name]
    model = graph(f"{IMAGE} {{ {body} y = Conv(x, v) }}", weights)
    module = made_of(model, tmp_path)
    assert sum(isinstance(part, nn.Conv2d) for part in module.modules()) == 1
    assert not told(module).opaque
    assert len([node for node in module.graph.nodes if node.op == "call_module"]) == 2, "constants are folded"
    require_equal(module, noise(2, 4, 7, 8))


def test_a_kernel_in_a_constant_node_and_one_that_is_filled(tmp_path: Path) -> None:
    filled = "shape = Constant<value_ints = [8, 4, 1, 1]>() w = ConstantOfShape<value = float[1] {0.25}>(shape)"
    model = image(f"a = Conv(x, v) {filled} y = Conv(a, w)", v=(4, 4, 3, 3))
    [kernel] = [one for one in model.graph.initializer if one.name == "v"]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["v"], value=kernel))
    model.graph.initializer.remove(kernel)
    module = made_of(model, tmp_path)
    first, second = (part for part in module.modules() if isinstance(part, nn.Conv2d))
    assert torch.equal(first.weight, torch.from_numpy(numpy_helper.to_array(kernel).copy()))
    assert bool((second.weight == 0.25).all())
    require_equal(module, noise(2, 4, 7, 8))


def test_a_bias_that_takes_its_type_from_the_input(tmp_path: Path) -> None:
    """As torch's new exporter writes a convolution without a bias, unless it optimises."""
    text = """
    (float[N, 4, 6, 6] x) => (float[N, 5, 4, 4] y) {
        zero = Constant<value_float = 0.0>()
        same = CastLike(zero, x)
        count = Shape<end = 1>(w)
        bias = Expand(same, count)
        y = Conv(x, w, bias)
    }
    """
    module = made_of(graph(text, {"w": (5, 4, 3, 3)}), tmp_path)
    assert told(module).opaque == {}
    [name] = told(module).nodes
    assert module.get_submodule(name).bias is not None
    require_equal(module, noise(2, 4, 6, 6))


def test_a_kernel_that_hangs_on_the_input_is_no_layer(tmp_path: Path) -> None:
    module = made_of(image("m = ReduceMean<keepdims = 0>(x) v = Mul(w, m) y = Conv(x, v)", w=(8, 4, 3, 3)), tmp_path)
    assert not any(isinstance(part, nn.Conv2d) for part in module.modules())
    assert told(module).opaque == {"Conv": 1}


def test_a_kernel_that_may_be_given_is_a_layer_in_old_files(tmp_path: Path) -> None:
    """Below IR version 4 every initialiser is listed as an input too, and may be left out."""
    text = "(float[N, 4, 7, 7] x, float[8, 4, 3, 3] w) => (float[N, 8, 5, 5] y) { y = Conv(x, w) }"
    model = graph(text, {"w": (8, 4, 3, 3)}, opset=7, ir=3)
    module = made_of(model, tmp_path)
    assert told(module).opened.session.input_names == ("x",)
    assert sum(isinstance(part, nn.Conv2d) for part in module.modules()) == 1
    require_equal(module, noise(2, 4, 7, 7))


def test_half_precision_comes_and_goes_as_the_graph_has_it(tmp_path: Path) -> None:
    model = graph(
        "(float16[N, 4, 8, 8] x) => (float16[N, 8, 6, 6] y) { a = Conv(x, w) y = Relu(a) }",
        {"w": drawn((8, 4, 3, 3), dtype=np.float16)},
    )
    module = made_of(model, tmp_path)
    [layer] = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    assert layer.weight.dtype == torch.float32
    x = noise(2, 4, 8, 8, dtype=torch.float16)
    require_equal(module, x, tolerance=4e-3)
    assert module(x)["y"].dtype == torch.float16


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    model = image("y = Conv(x, w)", w=(8, 4, 3, 3))
    kernel: Tensor = torch.from_numpy(numpy_helper.to_array(model.graph.initializer[0]).copy())
    onnx.external_data_helper.convert_model_to_external_data(model, location="beside.bin", size_threshold=0)
    onnx.save(model, str(tmp_path / "made.onnx"))
    stored = onnx.load(str(tmp_path / "made.onnx"), load_external_data=False)
    assert stored.graph.initializer[0].data_location == TensorProto.EXTERNAL
    module = made_of(stored, tmp_path)
    [layer] = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    assert torch.equal(layer.weight, kernel)
    require_equal(module, noise(1, 4, 6, 6))


def sparse(name: str, *shape: int) -> onnx.SparseTensorProto:
    """Every fifth number of a tensor."""
    places = np.arange(0, int(np.prod(shape)), 5)
    values = numpy_helper.from_array(drawn((1, len(places)))[0], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(places), shape)


@pytest.mark.parametrize("how", ["initialiser", "constant"])
def test_sparse_weights_are_those_of_layers_and_of_regions(how: str, tmp_path: Path) -> None:
    model = image("a = Conv(x, w) b = Add(a, s) y = com.microsoft.BiasGelu(b, t)", t=(8,))
    made = {"w": sparse("w", 8, 4, 3, 3), "s": sparse("s", 8, 1, 1)}
    if how == "constant":
        for name, value in made.items():
            model.graph.node.insert(0, helper.make_node("Constant", [], [name], sparse_value=value))
    else:
        model.graph.sparse_initializer.extend(made.values())
    module = made_of(model, tmp_path, noise(1, 4, 9, 10))
    assert any(isinstance(part, nn.Conv2d) for part in module.modules())
    require_equal(module, noise(3, 4, 9, 10, seed=1))
