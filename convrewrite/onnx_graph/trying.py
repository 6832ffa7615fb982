"""Whether a module computes what onnxruntime computed for a node."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convrewrite.onnx_graph.observing import Values
from convrewrite.onnx_graph.views import as_tensor

TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest difference of one node's output, relative to its largest element: sums of thousands of terms are added in another
order, and half precision has one more rounding, as modules hold it in float32."""

LOOSE = 100.0
"""Factor on the tolerance for a whole graph: rounding adds up from layer to layer."""


OF_UNIT_SCALE = ("Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Erf")
UNIT_SCALE = 0.05
"""Operators whose values lie between -1 and 1, and the least scale that their rounding is relative to: onnxruntime approximates
them to a fixed number of places, however small all of them are."""


def least_scale(op_type: str) -> float:
    """The least scale that the rounding of an operator's output is relative to, however small its elements are."""
    return UNIT_SCALE if op_type in OF_UNIT_SCALE else 0.0


def agrees(made: Any, names: Sequence[str], outputs: Sequence[str], runs: Sequence[Values], least: float = 0.0) -> bool:
    """Whether something made of a node gives, from the values ``names``, those of ``outputs`` in every run; outputs named "" are
    ignored. ``least``: the least scale that rounding is relative to."""
    for run in runs:
        given = [_given(run.get(name)) for name in names]
        if any(value is None for value in given):
            return False
        try:
            with torch.no_grad():
                found = made(*given)
        except Exception:  # an operator may fail in any way on what its maker did not foresee
            return False
        parts = found if isinstance(found, tuple | list) else (found,)
        wanted = [(name, part) for name, part in zip(outputs, parts, strict=False) if name]
        if len(parts) < len(outputs) or not all(
            isinstance(part, Tensor) and name in run and close(run[name], part.numpy(), least=least)
            for name, part in wanted
        ):
            return False
    return True


def _given(value: Any) -> Tensor | None:
    return as_tensor(value)


def close(expected: Any, found: Any, *, loose: bool = False, least: float = 0.0) -> bool:
    """Whether two arrays have one shape and the same numbers up to rounding; integers and booleans exactly. ``loose``: what a
    whole graph gives, in which double precision is never better than single: onnxruntime convolves in no better one."""
    if not isinstance(expected, np.ndarray) or expected.shape != found.shape:
        return False
    if expected.dtype.name not in TOLERANCE:
        same = np.array_equal(expected, found)
        return expected.dtype == found.dtype and bool(same or (loose and (expected == found).mean() > 0.999))
    wanted = expected.astype(np.float64)
    if found.dtype.kind != "f" or (expected.dtype.itemsize >= 4 and found.dtype != expected.dtype):
        return False
    finite = np.abs(wanted[np.isfinite(wanted)])
    scale = max(least, float(finite.max()) if finite.size else 0.0)
    kind = expected.dtype.name
    limit = (LOOSE * TOLERANCE["float32" if kind == "float64" else kind] if loose else TOLERANCE[kind]) * scale
    return bool(np.allclose(found.astype(np.float64), wanted, rtol=0.0, atol=limit, equal_nan=True))
