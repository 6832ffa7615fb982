"""Every operator whose form changed computes, in each version, what onnxruntime does; and those that onnx has no cases of."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx_nodes import checked

RANDOM = np.random.default_rng(0)

Node = tuple[str, int, list[Any], dict[str, Any], tuple[int, ...], int]
"""An operator, the version, its inputs, its attributes, which inputs may be constants, and the number of its outputs."""


def real(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def node(
    op: str, opset: int, inputs: list[Any], constants: tuple[int, ...] = (), outputs: int = 1, **attributes: Any
) -> Node:  # fmt: skip
    return op, opset, inputs, attributes, constants, outputs


def softmax_like() -> Iterator[Node]:
    """Before version 13 they make a matrix of all axes before and all behind."""
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        for opset in (7, 11, 13):
            yield node(op, opset, [real(2, 3, 4)])
            for axis in (0, 1, 2, *((-1, -2) if opset > 7 else ())):
                yield node(op, opset, [real(2, 3, 4)], axis=axis)


def axes_moved() -> Iterator[Node]:
    """Axes were attributes before they became inputs."""
    for opset in (7, 11):
        yield node("Squeeze", opset, [real(1, 3, 1)], axes=[2])
        yield node("Unsqueeze", opset, [real(2, 3)], axes=[0, 3])
    for opset in (7, 13):
        yield node("Squeeze", opset, [real(1, 3, 1)])
    yield node("Squeeze", 11, [real(1, 3, 1)], axes=[-1, 0])
    yield node("Squeeze", 13, [real(1, 3, 1), ints(-1)], (1,))
    yield node("Unsqueeze", 13, [real(2, 3), ints(-1, 0)], (1,))
    for op in ("Sum", "Mean", "Prod", "Max", "Min", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"):
        x, name = np.abs(real(2, 3, 4)) + 0.1, f"Reduce{op}"
        for opset in (7, 11, *(() if op == "Sum" else (13,))):
            yield node(name, opset, [x], axes=[0, 2])
            yield node(name, opset, [x], axes=[1], keepdims=0)
            yield node(name, opset, [x])
        for opset in (18, *((13,) if op == "Sum" else ())):
            yield node(name, opset, [x, ints(-1, 0)], (1,), keepdims=0)
            yield node(name, opset, [x, ints()], (1,))
            yield node(name, opset, [x], noop_with_empty_axes=1)
            yield node(name, opset, [x, ints()], (1,), noop_with_empty_axes=1)


def sizes_moved() -> Iterator[Node]:
    """Sizes, counts and bounds were attributes before they became inputs."""
    for opset in (7, 11):
        yield node("Split", opset, [real(6, 4)], outputs=3, split=[1, 3, 2])
        yield node("Split", opset, [real(6, 4)], outputs=2, axis=1)
    yield node("Split", 13, [real(6, 4), ints(1, 3, 2)], (1,), 3, axis=0)
    yield node("Split", 13, [real(6, 4)], outputs=2, axis=-1)
    yield node("Split", 18, [real(6, 7)], outputs=3, axis=1, num_outputs=3)
    yield node("TopK", 7, [real(3, 5)], outputs=2, k=2)
    x = np.array([[1, 3, 3, 0, 1], [2, 2, 2, 2, 2]], dtype=np.float32)
    yield node("TopK", 10, [x, ints(3)], (1,), 2)
    yield node("TopK", 11, [x, ints(4)], (1,), 2, largest=0)
    yield node("TopK", 11, [real(3, 5), ints(2)], (1,), 2, axis=0)
    for opset in (7, 10):
        yield node("Clip", opset, [real(3, 4)], min=-0.5, max=0.5)
        yield node("Clip", opset, [real(3, 4)], max=0.5)
        yield node("Clip", opset, [real(3, 4)])
    low, high = np.array(-0.5, np.float32), np.array(0.5, np.float32)
    for bounds in ([], [low], [None, high], [low, high], [high, low]):
        yield node("Clip", 11, [real(3, 4), *bounds], (1, 2))
    yield node("Clip", 12, [ints(1, 5, 9), np.array(2), np.array(6)], (1, 2))
    for opset in (7, 10, 12, 13):
        yield node("Dropout", opset, [real(3, 4)])
        yield node("Dropout", opset, [real(3, 4)], outputs=2)
    yield node("Dropout", 13, [real(3, 4), np.array(0.4, np.float32), np.array(False)], (1, 2))


def images() -> Iterator[Node]:
    for opset in (7, 8):
        yield node("Upsample", opset, [real(1, 2, 3, 4)], mode="nearest", scales=[1.0, 1.0, 2.0, 3.0])
        yield node("Upsample", opset, [real(1, 2, 3, 4)], mode="linear", scales=[1.0, 1.0, 2.0, 1.5])
    scales = np.array([1, 1, 2, 0.6], np.float32)
    for mode in ("nearest", "linear"):
        yield node("Upsample", 9, [real(1, 2, 3, 4), np.array([1, 1, 2, 1.7], np.float32)], (1,), mode=mode)
        yield node("Resize", 10, [real(1, 2, 3, 5), scales], (1,), mode=mode)
        yield node("Resize", 11, [real(1, 2, 3, 5), real(0), scales], (1, 2), mode=mode)
        way = "tf_half_pixel_for_nn"
        yield node(
            "Resize", 11, [real(1, 2, 3, 5), real(0), scales], (2,), mode=mode, coordinate_transformation_mode=way
        )
        yield node("Resize", 13, [real(1, 2, 3, 5), None, None, ints(1, 2, 6, 3)], (3,), mode=mode)
        yield node("Resize", 18, [real(1, 2, 3, 5), None, None, ints(3, 6)], (3,), mode=mode, axes=[-1, 2])
        yield node("Resize", 13, [real(1, 2, 3, 3), None, np.array([1, 1, 1.3, 1.3], np.float32)], (2,), mode=mode)
    yield node("Pad", 7, [real(1, 5, 3, 3)], pads=[0, 1, 2, 0, 0, 0, 1, 2], value=2.5)
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        yield node(op, 7, [real(2, 3, 4, 5)])
        yield node(op, 7, [real(2, 3, 4)])
    yield node("GlobalLpPool", 7, [real(2, 3, 4)], p=1)
    for size in (1, 3, 5):
        yield node("LRN", 7, [real(1, 6, 2, 2)], size=size, alpha=0.5, bias=2.0)
    yield node("GroupNormalization", 18, [real(2, 4, 3), real(2), real(2)], (1, 2), num_groups=2)
    yield node("GroupNormalization", 21, [real(2, 4, 3), real(4), real(4)], (1, 2), num_groups=2)


def places() -> Iterator[Node]:
    for index in (ints(0, -1), np.array([[1, 1], [0, -2]], dtype=np.int32), np.array(-1)):
        yield node("Gather", 11, [real(2, 3, 4), index], (1,), axis=-1)
    yield node("Gather", 11, [ints(2, 3, 5), np.array(1)], (1,))
    yield node("Transpose", 7, [np.array(1.5, np.float32)])
    yield node("Scatter", 9, [real(3, 3), ints(1, 0, 2).reshape(1, 3), real(1, 3)], (1,))
    for reduction in ("add", "mul", "max", "min"):
        index = ints(0, -1, 0, 1, 1, 1).reshape(2, 3)
        yield node("ScatterElements", 18, [real(3, 3), index, real(2, 3)], (1,), axis=1, reduction=reduction)
        yield node("ScatterND", 18, [real(3, 3), ints(0, -1, 0).reshape(3, 1), real(3, 3)], (1,), reduction=reduction)
    yield node("Slice", 7, [real(5, 6)], starts=[1, -3], ends=[9, -1], axes=[0, 1])
    end = 2**63 - 1
    for start, stop, step in ((-1, -end - 1, -1), (-9, -9, -1), (end, 0, -2), (2**31 - 1, 2**31 - 1, -2), (0, end, 2)):
        yield node("Slice", 10, [real(5, 6), ints(start), ints(stop), ints(1), ints(step)], (1, 2, 3, 4))
    yield node("Slice", 13, [real(5, 6), ints(1, 2), ints(3, 5)], (1, 2))
    yield node("OneHot", 9, [ints(0, -1, 7), np.array(3), real(2)], (1, 2))
    yield node("OneHot", 11, [ints(0, -1, 7), ints(3), real(2)], (1, 2), axis=0)
    for op in ("ArgMax", "ArgMin"):
        x = np.array([[1, 3, 3, 1], [2, 2, 2, 2]], dtype=np.float32)
        yield node(op, 7, [x], axis=1)
        yield node(op, 12, [x], axis=1, keepdims=0, select_last_index=1)
    for exclusive in (0, 1):
        for reverse in (0, 1):
            yield node("CumSum", 11, [real(3, 4), np.array(-1)], (1,), exclusive=exclusive, reverse=reverse)


def numbers() -> Iterator[Node]:
    """Whole numbers round towards zero, and an exponent may be of another type."""
    a, b = ints(7, -7, 7, -7), ints(2, 2, -2, -2)
    for op in ("Div", "Mod"):
        yield node(op, 13, [a, b], (1,))
    yield node("Mod", 13, [a, b], fmod=1)
    yield node("Mod", 13, [real(5), real(5)], fmod=1)
    yield node("Div", 7, [a.astype(np.int32), b.astype(np.int32)])
    for exponent in (np.array(2), np.array([1, 2, 3], np.int32), np.array(0.5, np.float32), np.array(2.0)):
        yield node("Pow", 13, [np.abs(real(2, 3)), exponent], (1,))
    yield node("Pow", 13, [ints(1, 4, 9), np.array([0.5], np.float32)], (1,))
    for to in (1, 7, 9, 10, 11):
        yield node("Cast", 13, [real(5) * 3], to=to)
    yield node("Shrink", 9, [ints(-3, -1, 0, 2)], lambd=1.5, bias=1.0)
    yield node("ReduceMean", 13, [ints(-3, 1, 0, 1, 5, 4).reshape(2, 3)], axes=[1])
    yield node("ReduceMax", 20, [np.zeros((2, 0), np.int32), ints(1)], (1,))
    yield node("ReduceMin", 20, [np.zeros((2, 0), np.int32), ints(1)], (1,))
    yield node("HardSigmoid", 7, [real(20) * 4], alpha=float(np.float32(1 / 6)), beta=0.5)
    yield node("HardSigmoid", 7, [real(20) * 4], alpha=0.3, beta=0.4)
    yield node("LayerNormalization", 17, [real(2, 3), real(1), real(1)], (1, 2))
    yield node("PRelu", 9, [real(2, 3, 4), real(4)], (1,))
    yield node("PRelu", 9, [real(2, 3, 4), real(3, 1)], (1,))
    yield node("PRelu", 9, [real(2, 3, 4), real(1)], (1,))
    yield node("PRelu", 16, [ints(-3, 2, 4), ints(2)], (1,))
    yield node("Not", 7, [np.array([True, False])])
    for op in ("Max", "Min", "Mean", "Sum"):
        yield node(op, 8, [real(2, 3)])
        yield node(op, 8, [real(2, 3), real(3), real(2, 1)], (1,))
    for op, c in (("Gemm", real(5)), ("Gemm", real(3, 1))):
        yield node(op, 7, [real(4, 3), real(5, 4), c], (2,), transA=1, transB=1, alpha=0.5, beta=2.0)
    yield node("Gemm", 11, [real(3, 4), real(4, 5)])


def quantised() -> Iterator[Node]:
    x = np.array([[0, 0.5, 1.5, -2.5], [300, -300, 63.5, 7]], dtype=np.float32)
    scale, zero = np.array(0.5, np.float32), np.array(3, np.int8)
    for opset in (10, 13, 21):
        yield node("QuantizeLinear", opset, [x, scale], (1,))
        yield node("QuantizeLinear", opset, [x, scale, zero], (1, 2))
        yield node("DequantizeLinear", opset, [(x / 4).astype(np.int8), scale, zero], (1, 2))
        yield node("DequantizeLinear", opset, [(x / 4).astype(np.int32), scale], (1,))
    scales, zeros = np.array([0.5, 0.25], np.float32), np.array([128, 3], np.uint8)
    for opset in (13, 21):
        yield node("QuantizeLinear", opset, [x, scales, zeros], (1, 2), axis=0)
        yield node("DequantizeLinear", opset, [np.abs(x / 4).astype(np.uint8), scales, zeros], (1, 2), axis=-2)


def attention() -> Iterator[Node]:
    """Heads as an axis or within the features, fewer of the keys than of the queries, masks of both kinds."""
    q, k, v = real(2, 4, 3, 6), real(2, 2, 5, 6), real(2, 2, 5, 7)
    for mask in (None, real(3, 5), real(3, 5) > -1):
        for causal in (0, 1):
            if mask is not None and mask.dtype == bool:
                mask[:, 0] = True  # nothing is said about a place that sees none
            yield node("Attention", 23, [q, k, v, mask], (3,), is_causal=causal)
    packed = [real(2, 3, 8), real(2, 5, 4), real(2, 5, 6)]
    yield node("Attention", 23, packed, q_num_heads=4, kv_num_heads=2, scale=0.3)


def microsoft() -> Iterator[Node]:
    """What onnxruntime's own optimisation leaves in files."""
    x = real(2, 3, 4)
    for op in ("Gelu", "FastGelu", "QuickGelu"):
        yield node(f"com.microsoft::{op}", 17, [x])
    yield node("com.microsoft::QuickGelu", 17, [x], alpha=1.0)
    for op in ("BiasGelu", "FastGelu"):
        yield node(f"com.microsoft::{op}", 17, [x, real(4)], (1,))
    yield node("com.microsoft::FusedMatMul", 17, [real(2, 4, 3), real(2, 5, 4)], transA=1, transB=1, alpha=0.5)
    yield node("com.microsoft::FusedMatMul", 17, [real(4, 2, 3), real(4, 2, 5)], transBatchA=1, transBatchB=1, transA=1)
    yield node("com.microsoft::FusedMatMul", 17, [real(3, 4), real(4)], transB=1)
    for activation in ("Relu", "Sigmoid", "Tanh"):
        inputs = [real(3, 4), real(5, 4), real(5)]
        yield node("com.microsoft::FusedGemm", 17, inputs, (1, 2), transB=1, activation=activation)
    for more in ([], [real(4)], [real(4), real(4)], [None, real(4)]):
        yield node(
            "com.microsoft::SkipLayerNormalization", 17, [x, real(2, 3, 4), real(4), *more], (2, 3, 4), epsilon=0.1
        )
    yield node("SimplifiedLayerNormalization", 17, [x, real(4)], (1,))


def recurrent() -> Iterator[Node]:
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        for direction in ("forward", "reverse", "bidirectional"):
            n = 2 if direction == "bidirectional" else 1
            weights = [real(5, 2, 4), real(n, 3 * gates, 4), real(n, 3 * gates, 3), real(n, 6 * gates)]
            states = [None, real(n, 2, 3), *([real(n, 2, 3)] if op == "LSTM" else [])]
            for before in (0, 1) if op == "GRU" else (None,):
                more = {} if before is None else {"linear_before_reset": before}
                outputs = 3 if op == "LSTM" else 2
                yield node(op, 14, weights, (1, 2, 3), 1, hidden_size=3, direction=direction, **more)
                yield node(op, 14, weights + states, (1, 2, 3), outputs, hidden_size=3, direction=direction, **more)
                yield node(
                    op, 14, weights + states, (1, 2, 3, 5, 6), outputs, hidden_size=3, direction=direction, **more
                )
    yield node("RNN", 14, [real(5, 2, 4), real(1, 3, 4), real(1, 3, 3)], (1, 2), hidden_size=3, activations=["Relu"])


NEED_CONSTANTS = ("LSTM", "GRU", "RNN", "Dropout")
"""Operators that torch does not have with computed weights, or that may then drop something."""

GROUPS = (softmax_like, axes_moved, sizes_moved, images, places, numbers, quantised, attention, microsoft, recurrent)


@pytest.mark.parametrize("group", GROUPS)
def test_in_each_version_an_operator_computes_what_onnxruntime_does(group: Any) -> None:
    for op, opset, inputs, attributes, constants, outputs in group():
        for known in dict.fromkeys(((), constants)):
            made = checked(op, opset, inputs, attributes, known, outputs)
            assert made is not None or (op in NEED_CONSTANTS and not known), (op, opset, attributes, known)
