"""Small ONNX graphs from text, with their weights, and the modules that are made of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, fx

from convrewrite.onnx_files.model import OnnxModel
from convrewrite.onnx_graph.examples import example_of_graph
from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.opening import Opened
from convrewrite.onnx_graph.source_files import SourceFiles, stamp_of
from convrewrite.onnx_graph.translating import Translation, translate, translation_of

OPSET, IR = 17, 8
"""Versions of operators and of the file where a graph asks for no others."""

CLASSIFIER = """
(float[N, 3, 16, 16] image) => (float[N, 10] logits) {
    a = Conv<pads = [1, 1, 1, 1]>(image, stem_weight, stem_bias)
    b = Relu(a)
    c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(b, first_weight)
    d = BatchNormalization(c, gamma, beta, mean, variance)
    e = Relu(d)
    f = Conv<pads = [1, 1, 1, 1]>(e, second_weight, second_bias)
    g = Relu(f)
    h = GlobalAveragePool(g)
    i = Flatten(h)
    logits = Gemm<transB = 1>(i, head_weight, head_bias)
}
"""
"""A stem, two convolutions that the rule ``separable`` takes, the first before a BatchNorm, and a dense layer."""

CLASSIFIER_SHAPES = {
    "stem_weight": (16, 3, 3, 3), "stem_bias": (16,), "first_weight": (32, 16, 3, 3), "gamma": (32,), "beta": (32,),
    "mean": (32,), "variance": (32,), "second_weight": (32, 32, 3, 3), "second_bias": (32,), "head_weight": (10, 32),
    "head_bias": (10,),
}  # fmt: skip


def drawn(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    """Numbers that keep the scale of what comes in; between 0.5 and 1.5 where there is one for each channel."""
    random = np.random.default_rng(seed)
    if len(shape) == 1:
        return random.uniform(0.5, 1.5, shape).astype(dtype)
    return (random.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(dtype)


def graph(
    text: str, weights: Mapping[str, NDArray[Any] | tuple[int, ...]] | None = None, opset: int = OPSET, ir: int = IR
) -> onnx.ModelProto:
    """``(inputs) => (outputs) { nodes }`` as a model; ``weights`` are arrays, or shapes of drawn ones, by name."""
    domains = "".join(f', "{name}": 1' for name in ("com.microsoft", "own") if f"{name}." in text)
    model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}{domains}]> agraph {text}')
    for seed, (name, value) in enumerate((weights or {}).items()):
        array = drawn(value, seed) if isinstance(value, tuple) else value
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def classifier() -> onnx.ModelProto:
    """(N, 3, 16, 16) ``image`` -> (N, 10) ``logits``."""
    return graph(CLASSIFIER, CLASSIFIER_SHAPES)


def opened(model: onnx.ModelProto, folder: Path) -> Opened:
    """A file that is trusted: it is opened in this process alone."""
    path = folder / "made.onnx"
    onnx.save(model, str(path))
    return Opened(
        OnnxFile(onnx.load(str(path)), folder, str(path), path), OnnxModel(path), SourceFiles(path, stamp_of(path))
    )


def made_of(model: onnx.ModelProto, folder: Path, example: Any = None) -> fx.GraphModule:
    """The module of a graph."""
    source = opened(model, folder)
    return translate(source, example_of_graph(source.session, example)[0])


def told(module: fx.GraphModule) -> Translation:
    """What a module has to do with its graph."""
    translation = translation_of(module)
    assert translation is not None
    return translation


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def require_equal(module: fx.GraphModule, *inputs: Tensor, tolerance: float = 2e-5) -> None:
    """The module gives what onnxruntime gives for the whole graph, up to rounding of the largest element."""
    expected = told(module).opened.session(*inputs)
    with torch.no_grad():
        found = module(*inputs)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape
        assert found[name].dtype == wanted.dtype
        if wanted.dtype.is_floating_point:
            scale = float(wanted.abs().max())
            assert scale > 0
            assert float((found[name] - wanted).abs().max()) <= tolerance * scale, name
        else:
            assert torch.equal(found[name], wanted), name
