"""Products of matrices of which none is a layer's weight, and other sums of products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker, made


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float, beta: float, transA: int, transB: int  # noqa: N803
) -> Tensor:  # fmt: skip
    """``alpha * a @ b + beta * c``, a and b transposed where asked for."""
    product = (a.t() if transA else a) @ (b.t() if transB else b)
    if alpha != 1:
        product = (alpha * product).to(product.dtype)
    if c is None:
        return product
    return product + (c if beta == 1 else (beta * c).to(c.dtype))


def fused_matmul(
    a: Tensor, b: Tensor, *, alpha: float, transA: int, transB: int, transBatchA: int, transBatchB: int  # noqa: N803
) -> Tensor:  # fmt: skip
    """``alpha * a @ b``; where asked for, the first axis of each becomes the last but one, then the last two are exchanged."""
    return alpha * (_arranged(a, transBatchA, transA) @ _arranged(b, transBatchB, transB))


def _arranged(x: Tensor, batch: int, transposed: int) -> Tensor:
    if x.dim() < 2:
        return x
    x = x.movedim(0, -2) if batch else x
    return x.transpose(-1, -2) if transposed else x


def fused_gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, activation: Callable[[Tensor], Tensor], **settings: Any
) -> Tensor:  # fmt: skip
    """A function of what :func:`gemm` gives."""
    return activation(gemm(a, b, c, **settings))


def einsum(*values: Tensor, equation: str) -> Tensor:
    """Sums of products as the equation says."""
    return torch.einsum(equation, *values)


FUSED: dict[str, Callable[[Tensor], Tensor]] = {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
"""Functions without parameters that onnxruntime fuses with a product -> those of torch."""


def make_fused_gemm(view: NodeView) -> Made | None:
    """None for functions that have parameters."""
    defaults = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    settings = {name: view.attributes.get(name, default) for name, default in defaults.items()}
    return Computed(fused_gemm, view, {"activation": FUSED[view.attributes["activation"]], **settings})


CONTRACTIONS: dict[str, Maker] = {
    "MatMul": made(torch.matmul),
    "Gemm": made(gemm, alpha=1.0, beta=1.0, transA=0, transB=0),
    "Einsum": made(einsum, equation=""),
    "Det": made(torch.det),
    "com.microsoft::FusedMatMul": made(fused_matmul, alpha=1.0, transA=0, transB=0, transBatchA=0, transBatchB=0),
    "com.microsoft::FusedGemm": make_fused_gemm,
}
"""Operators that sum products -> their makers."""
