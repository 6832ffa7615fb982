"""ONNX models in a few lines, chains that compute what a convolution does, and what must be the same after surgery."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from convrewrite.layers import SumOfBranches
from convrewrite.onnx_graph.file import OnnxFile, Replacement
from convrewrite.onnx_graph.surgery import write_rewritten

Array = NDArray[Any]

EPSILONS = {np.dtype(np.float32): 2**-23, np.dtype(np.float16): 2**-10, np.dtype(np.float64): 2**-52}


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) / 4).astype(dtype)


def tensor(name: str, array: Array) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def value(
    name: str, shape: Sequence[int | str] = ("n", "c", "h", "w"), kind: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    initialisers: list[TensorProto],
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    **more: Any,
) -> onnx.ModelProto:
    given = inputs or [value("x", ["n", 4, 9, 10])]
    if ir_version < 4:
        given = [*given, *(value(t.name, list(t.dims), t.data_type) for t in initialisers)]
    graph = helper.make_graph(nodes, "graph", given, outputs or [value("y")], initialisers)
    imports = [helper.make_opsetid("", opset), *more.pop("domains", [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, **more)


def file_of(model: onnx.ModelProto, folder: Path | None = None, path: Path | None = None) -> OnnxFile:
    return OnnxFile(model, folder or Path(), "model.onnx", path)


def run(source: onnx.ModelProto | Path, **feed: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    given = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, feed)]


def assert_same(first: Iterable[Array], second: Iterable[Array], steps: int = 64) -> None:
    """Equal to rounding: ``steps`` of the dtype at the size of the largest number."""
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        largest = np.abs(one.astype(np.float64)).max()
        assert largest > 0
        np.testing.assert_allclose(other, one, rtol=0, atol=steps * EPSILONS[one.dtype] * max(largest, 1))


def conv_of(weight: Array, bias: Array | None = None, **geometry: Any) -> nn.Conv2d:
    out, in_per_group, *kernel = weight.shape
    groups = geometry.get("groups", 1)
    conv = nn.Conv2d(in_per_group * groups, out, tuple(kernel), bias=bias is not None, **geometry)  # type: ignore[arg-type]
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(np.array(weight, np.float32)))
        if conv.bias is not None:
            assert bias is not None
            conv.bias.copy_(torch.from_numpy(np.array(bias, np.float32)))
    return conv


def turned(channels: int) -> Array:
    """An orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(5).standard_normal((channels, channels)))[0]


def chain_of(weight: Array, bias: Array | None = None, **geometry: Any) -> nn.Sequential:
    """A pointwise convolution and a spatial one that together have this kernel."""
    matrix = turned(weight.shape[1])
    kernel = np.einsum("oikl,ji->ojkl", weight.astype(np.float64), matrix)
    return nn.Sequential(conv_of(matrix[:, :, None, None]), conv_of(kernel, bias, **geometry))


def halves_of(weight: Array, bias: Array | None = None, **geometry: Any) -> SumOfBranches:
    """Two branches that together have this kernel, one of them with the bias."""
    first = np.where(np.arange(weight.shape[-1]) % 2 == 0, weight, 0)
    return SumOfBranches([chain_of(first, bias, **geometry), nn.Sequential(conv_of(weight - first, None, **geometry))])


def untouched(before: onnx.ModelProto, after: onnx.ModelProto, nodes: set[int], initialisers: set[str]) -> None:
    """All but ``nodes``, positions before, and ``initialisers``, names before, is there in the same order and bytes."""
    old = [n.SerializeToString() for i, n in enumerate(before.graph.node) if i not in nodes]
    new = [node.SerializeToString() for node in after.graph.node]
    assert [text for text in new if text in old] == old
    weights = [t.SerializeToString() for t in before.graph.initializer if t.name not in initialisers]
    assert [t.SerializeToString() for t in after.graph.initializer][: len(weights)] == weights
    assert {t.name for t in after.graph.initializer} & initialisers == set()
    for field in ("functions", "opset_import", "training_info"):
        assert [m.SerializeToString() for m in getattr(before, field)] == [
            m.SerializeToString() for m in getattr(after, field)
        ]
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(before, field) == getattr(after, field)
    assert (before.graph.name, before.graph.doc_string) == (after.graph.name, after.graph.doc_string)


def written(file: OnnxFile, replacements: Sequence[Replacement], folder: Path) -> tuple[onnx.ModelProto, Path]:
    path = folder / "result.onnx"
    notes = write_rewritten(file, replacements, path)
    assert [note for note in notes if not note.startswith(("weights stand in a second", "weights that were"))] == []
    return onnx.load(str(path), load_external_data=False), path


W, B = numbers(8, 4, 3, 3), numbers(8, seed=1)
IMAGE = numbers(2, 4, 9, 10, seed=2)
