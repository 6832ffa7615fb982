"""Every operator computes what onnxruntime does, on the cases that onnx itself has for it."""

import warnings
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_nodes import COMPUTED, assert_same, call, key_of, make, runtime_outputs, view_of

from convrewrite.onnx_graph.operators import OPERATORS

WEIGHTS = (1, 2, 3, 4, 5, 6, 7)

USUAL: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Split", "Gather", "GatherElements", "GatherND", "TopK", "CumSum",
         "Pow", "Trilu", "AffineGrid", "PRelu", "RMSNormalization", "Compress", "Scatter", "ScatterElements", "ScatterND",
         "Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Where", "Concat", "Equal", "And", "MatMul", "Gemm", "Einsum",
         "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceLogSum",
         "ReduceLogSumExp", "ReduceSumSquare", "ReverseSequence", "Upsample"), (1,)),
    **dict.fromkeys(("Clip", "OneHot", "Dropout", "LayerNormalization", "InstanceNormalization", "GroupNormalization"), (1, 2)),
    "Resize": (1, 2, 3), "Pad": (1, 2, 3), "Slice": (1, 2, 3, 4),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), WEIGHTS),
}  # fmt: skip
"""Inputs that networks usually have as constants, by their positions."""

WITHOUT_CASES = {"GlobalLpPool", "SimplifiedLayerNormalization"} | {key for key in OPERATORS if "::" in key}
"""Operators for which onnx has no case of one node; they are in the tests by version."""

TOO_OLD = {"Not", "RNN"}
"""Operators whose cases are of versions that are not translated; they are in the tests by version."""

PLAIN_ALONE = {"Attention"}
"""Operators of which most cases are of forms that no convolutional network has."""


@cache
def cases() -> dict[str, list[Any]]:
    """By operator, those of one node and of numbers that torch computes with."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how the cases compute their outputs
        collected = collect_testcases(None)
    found = defaultdict(list)
    for case in collected:
        given, wanted = case.data_sets[0]
        arrays = [a for a in map(array, [*given, *wanted]) if isinstance(a, np.ndarray | np.generic)]
        if len(case.model.graph.node) == 1 and all(a.dtype.name in COMPUTED for a in arrays):
            found[key_of(case.model.graph.node[0])].append(case)
    return dict(found)


def array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def opset_of(model: onnx.ModelProto) -> int:
    return max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


@cache
def outcomes(key: str) -> list[tuple[str, bool]]:
    """For every case, twice where there are usual constants: its name and whether it was made, its numbers then compared."""
    found = []
    for case in cases().get(key, ()):
        node, (given, stated) = case.model.graph.node[0], case.data_sets[0]
        values = dict(zip([entry.name for entry in case.model.graph.input], map(array, given), strict=True))
        wanted = None
        for constants in dict.fromkeys(((), USUAL.get(key, ()))):
            view = view_of(node, opset_of(case.model), values, constants)
            made = make(view, key)
            found.append((case.name, made is not None))
            if made is None:
                continue
            wanted = wanted or runtime_outputs(case.model, values)
            if wanted is None or any(value.dtype == object for value in wanted):
                wanted = list(map(array, stated))
            for output, expected in zip(call(made, view, node, values), wanted, strict=True):
                assert_same(output, expected)
    return found


@pytest.mark.parametrize("key", sorted(OPERATORS.keys() - WITHOUT_CASES))
def test_an_operator_computes_what_onnxruntime_does(key: str) -> None:
    made = [made for _, made in outcomes(key)]
    assert made, "onnx has no case of this operator"
    assert any(made) or key in TOO_OLD


def test_few_cases_are_left_to_onnxruntime() -> None:
    counted = OPERATORS.keys() - WITHOUT_CASES - TOO_OLD - PLAIN_ALONE
    left = {name for key in counted for name, made in outcomes(key) if not made}
    total = sum(len(cases()[key]) for key in counted)
    assert len(left) < 0.06 * total, sorted(left)


def test_the_names_in_these_tests_are_those_of_operators() -> None:
    assert OPERATORS.keys() >= WITHOUT_CASES | TOO_OLD | PLAIN_ALONE | USUAL.keys()
    assert not WITHOUT_CASES & cases().keys()
