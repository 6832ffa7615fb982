"""Even ranges between the stages of a site: a diagonal scale there can be chosen freely.

Where one convolution follows another with nothing between them, channel r of what lies between may be multiplied by any s > 0,
in the first one's filters, and divided by it in the second one's: the chain computes the same, up to rounding. An int8 tensor has
one scale for all channels, so a channel that is much smaller than the largest is left with few of the 256 steps; depthwise stages
have such channels. With a_r the largest value of the channel on the calibration inputs and w_r the largest weight that reads it,

    s_r = a_r^-p * w_r^(1-p),   scaled so that the largest value of all stays what it was,

p = 1 makes all channels equally large, at the cost of uneven weights; p = 1/2 shares the unevenness between both, which is
cross-layer equalisation (Nagel et al. 2019), given there for channels behind a ReLU. Which is better is measured.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from convrewrite.onnx_files import open_session

Feeds = Sequence[Mapping[str, NDArray[Any]]]
"""Inputs of a graph by name, batch after batch."""

POWERS = (None, 0.5, 1.0)
"""Scales between stages that are tried: none, shared between values and weights, and even values."""

FACTOR = 2.0**12
"""How many times larger or smaller than the median a scale may be: beyond it float32 itself loses digits."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two convolutions in a row: what lies between, their weights' names, the first one's bias if it has one, and the second
    one's groups."""

    between: str
    first: str
    bias: str
    second: str
    groups: int


def evened(model: onnx.ModelProto, feeds: Feeds, power: float) -> onnx.ModelProto:
    """A copy of a model whose pairs of convolutions in a row have even ranges between them; ``power`` is p above."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    pairs = _pairs(changed)
    if not pairs:
        return changed
    weights = {entry.name: entry for entry in changed.graph.initializer}
    for pair, largest in zip(pairs, _largest(changed, [pair.between for pair in pairs], feeds), strict=True):
        _scale(weights, pair, largest, power)
    return changed


def even_scales(largest: NDArray[np.float64], reading: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """s above, for every channel: ``largest`` are the largest values of each, ``reading`` the largest weights that read it."""
    seen = (largest > 0) & (reading > 0)
    scale = np.ones_like(largest)
    if not seen.any():
        return scale
    scale[seen] = largest[seen] ** -power * reading[seen] ** (1 - power)
    middle = np.median(scale[seen])
    scale[seen] = np.clip(scale[seen] / middle, 1 / FACTOR, FACTOR)
    scale[seen] *= largest[seen].max() / (largest[seen] * scale[seen]).max()
    return scale


def has_pairs(model: onnx.ModelProto) -> bool:
    """Whether there is anything to scale."""
    return bool(_pairs(model))


def _pairs(model: onnx.ModelProto) -> list[_Pair]:
    """The pairs whose weights are used nowhere else, and whose value in between nothing else reads."""
    graph = model.graph
    used = Counter(_read(graph))
    used.update(entry.name for entry in graph.output)
    weights = {entry.name for entry in graph.initializer if entry.data_type == onnx.TensorProto.FLOAT}
    makers = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        first = makers.get(node.input[0]) if node.op_type == "Conv" else None
        if first is None or first.op_type != "Conv" or used[node.input[0]] != 1:
            continue
        bias = first.input[2] if len(first.input) > 2 else ""
        own = [first.input[1], node.input[1], *([bias] if bias else [])]
        if all(name in weights and used[name] == 1 for name in own):
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            found.append(_Pair(node.input[0], first.input[1], bias, node.input[1], groups))
    return found


def _read(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that nodes read, those in the branches and loops of others too: these see the names of the graph around them."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _read(inner)
                yield from (entry.name for entry in inner.output)


def _largest(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> list[NDArray[np.float64]]:
    """The largest magnitude of every channel of some values, over all inputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session = open_session(watched.SerializeToString())
    found: list[NDArray[np.float64]] = []
    for feed in feeds:
        arrays = session.run(None, dict(feed))
        now = [np.abs(a).max(axis=(0, *range(2, a.ndim))).astype(np.float64) for a in arrays]
        found = now if not found else [np.maximum(a, b) for a, b in zip(found, now, strict=True)]
    return found


def _scale(weights: Mapping[str, onnx.TensorProto], pair: _Pair, largest: NDArray[np.float64], power: float) -> None:
    first, second = (numpy_helper.to_array(weights[name]).astype(np.float64) for name in (pair.first, pair.second))
    readers = second.reshape(pair.groups, second.shape[0] // pair.groups, second.shape[1], -1)
    reading = np.abs(readers).max(axis=(1, 3)).reshape(-1)  # by channel of what lies between
    scale = even_scales(largest, reading, power)
    _put(weights[pair.first], first * scale.reshape(-1, *[1] * (first.ndim - 1)))
    if pair.bias:
        _put(weights[pair.bias], numpy_helper.to_array(weights[pair.bias]) * scale)
    inverse = (1 / scale).reshape(pair.groups, 1, second.shape[1], 1)
    _put(weights[pair.second], (readers * inverse).reshape(second.shape))


def _put(tensor: onnx.TensorProto, array: NDArray[Any]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.astype(np.float32)), tensor.name))
