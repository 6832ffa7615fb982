"""Products of matrices of which none is a layer's weight, and other sums of products."""

import torch
from torch import Tensor

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Made, Maker, made


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


def fused_matmul(a: Tensor, b: Tensor, *, alpha: float, transA: int, transB: int) -> Tensor:  # noqa: N803
    """``alpha * a @ b``, the last two axes of a and b exchanged where asked for."""
    left = a.transpose(-1, -2) if transA and a.dim() > 1 else a
    right = b.transpose(-1, -2) if transB and b.dim() > 1 else b
    return alpha * (left @ right)


def einsum(*values: Tensor, equation: str) -> Tensor:
    """Sums of products as the equation says."""
    return torch.einsum(equation, *values)


def make_fused_matmul(view: NodeView) -> Made | None:
    """None where axes other than the last two are exchanged."""
    if view.attributes.get("transBatchA", 0) or view.attributes.get("transBatchB", 0):
        return None
    return made(fused_matmul, alpha=1.0, transA=0, transB=0)(view)


CONTRACTIONS: dict[str, Maker] = {
    "MatMul": made(torch.matmul),
    "Gemm": made(gemm, alpha=1.0, beta=1.0, transA=0, transB=0),
    "Einsum": made(einsum, equation=""),
    "Det": made(torch.det),
    "com.microsoft::FusedMatMul": make_fused_matmul,
}
"""Operators that sum products -> their makers."""
