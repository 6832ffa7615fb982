"""Functions of one value each, and those that only look along one axis."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Made, Maker, made, since
from convrewrite.onnx_graph.operators.shapes import flatten

SINGLE_PRECISION = 2.0**-23
"""Relative precision of the attributes, which are stored in single precision."""


def relu(view: NodeView) -> Made | None:
    """The module by which the pipeline recognises a rectifier."""
    return nn.ReLU() if len(view.present) == 1 else None


def celu(x: Tensor, *, alpha: float) -> Tensor:
    """Its exponential is of ``x / alpha``."""
    return F.celu(x, alpha)


def elu(x: Tensor, *, alpha: float) -> Tensor:
    """Exponential below zero."""
    return F.elu(x, alpha)


def selu(x: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """An ELU, scaled by gamma."""
    return gamma * F.elu(x, alpha)


def gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Of the sum with a bias, where there is one."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The form with a hyperbolic tangent."""
    return gelu(x, bias, approximate="tanh")


def swish(x: Tensor, *, alpha: float) -> Tensor:
    """The value times the sigmoid of alpha times it."""
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def hard_sigmoid(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    """A line cut off at 0 and 1; torch has the one through (-3, 0) and (3, 1)."""
    if beta == 0.5 and math.isclose(alpha, 1 / 6, rel_tol=SINGLE_PRECISION):
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


def leaky_relu(x: Tensor, *, alpha: float) -> Tensor:
    """Alpha is the slope below zero."""
    return F.leaky_relu(x, alpha)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """The slope below zero broadcasts to ``x``; torch takes a single slope, or one for each channel."""
    per_channel = x.dim() > 1 and slope.shape == (x.shape[1], *[1] * (x.dim() - 2))
    if x.is_floating_point() and (slope.numel() == 1 or per_channel):
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, slope * x, x)


def shrink(x: Tensor, *, bias: float, lambd: float) -> Tensor:
    """Nothing within lambd of zero; beyond, the value moved towards zero by the bias."""
    if not x.is_floating_point():
        return shrink(x.double(), bias=bias, lambd=lambd).to(x.dtype)
    beyond = torch.where(x > lambd, x - bias, torch.zeros_like(x))
    return torch.where(x < -lambd, x + bias, beyond)


def thresholded_relu(x: Tensor, *, alpha: float) -> Tensor:
    """The values above alpha."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def softplus(x: Tensor) -> Tensor:
    """Exact for large values too, which ``torch.nn.functional.softplus`` cuts off."""
    return -F.logsigmoid(-x)


def softmax(x: Tensor, *, axis: int) -> Tensor:
    """Along one axis."""
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int) -> Tensor:
    """Along one axis."""
    return torch.log_softmax(x, axis)


def hardmax(x: Tensor, *, axis: int) -> Tensor:
    """One at the first of the largest values, zero elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def softmax_of_rows(x: Tensor, *, axis: int) -> Tensor:
    """Over all axes from ``axis`` on."""
    return torch.softmax(flatten(x, axis=axis), 1).reshape(x.shape)


def log_softmax_of_rows(x: Tensor, *, axis: int) -> Tensor:
    """Over all axes from ``axis`` on."""
    return torch.log_softmax(flatten(x, axis=axis), 1).reshape(x.shape)


def hardmax_of_rows(x: Tensor, *, axis: int) -> Tensor:
    """Over all axes from ``axis`` on."""
    return hardmax(flatten(x, axis=axis), axis=1).reshape(x.shape)


def is_inf(x: Tensor, *, detect_negative: int, detect_positive: int) -> Tensor:
    """Infinities of the signs asked for."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | torch.isneginf(x)
    return found | torch.isposinf(x) if detect_positive else found


ACTIVATIONS: dict[str, Maker] = {
    **{name: made(getattr(torch, name.lower())) for name in (
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "IsNaN",
        "Log", "Neg", "Reciprocal", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Tan", "Tanh",
    )},
    "Not": made(torch.logical_not),
    "BitwiseNot": made(torch.bitwise_not),
    "IsInf": made(is_inf, detect_negative=1, detect_positive=1),
    "Relu": relu,
    "Celu": made(celu, alpha=1.0),
    "Elu": made(elu, alpha=1.0),
    "Selu": made(selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "Gelu": made(gelu, approximate="none"),
    "Swish": made(swish, alpha=1.0),
    "HardSigmoid": made(hard_sigmoid, alpha=0.2, beta=0.5),
    "HardSwish": made(F.hardswish),
    "LeakyRelu": made(leaky_relu, alpha=0.01),
    "PRelu": made(prelu),
    "Mish": made(F.mish),
    "Shrink": made(shrink, bias=0.0, lambd=0.5),
    "ThresholdedRelu": made(thresholded_relu, alpha=1.0),
    "Softplus": made(softplus),
    "Softsign": made(F.softsign),
    "Softmax": since(13, made(softmax, axis=-1), before=made(softmax_of_rows, axis=1)),
    "LogSoftmax": since(13, made(log_softmax, axis=-1), before=made(log_softmax_of_rows, axis=1)),
    "Hardmax": since(13, made(hardmax, axis=-1), before=made(hardmax_of_rows, axis=1)),
    "com.microsoft::Gelu": made(gelu),
    "com.microsoft::BiasGelu": made(gelu),
    "com.microsoft::FastGelu": made(fast_gelu),
    "com.microsoft::QuickGelu": made(swish, alpha=1.702),
}  # fmt: skip
"""Operators of one input, some with parameters -> their makers. The numbers are the standard's defaults."""
