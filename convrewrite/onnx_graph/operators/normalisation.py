"""What centres and scales by moments of its own input."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker, made

MEAN_VARIANCE_EPSILON = 1e-9
"""Added to the deviation of MeanVarianceNormalization: it is the standard's, which has no attribute for it."""


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """Every channel of every image by itself."""
    per_channel = (-1, *[1] * (x.dim() - 2))
    normal = _standardised(x, tuple(range(2, x.dim())), epsilon)[0]
    return normal * scale.reshape(per_channel) + bias.reshape(per_channel)


def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float, per_group: bool
) -> Tensor:  # fmt: skip
    """Groups of channels; scale and bias are one for each channel, or ``per_group``."""
    if per_group:
        normal = _standardised(x.reshape(x.shape[0], num_groups, -1), (2,), epsilon)[0]
        return (normal * scale.reshape(-1, 1) + bias.reshape(-1, 1)).reshape(x.shape)
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All axes from ``axis`` on; also gives their mean, and the factor that scaled them."""
    normal, mean, factor = _standardised(x, _from(x, axis), epsilon)
    scaled = normal * scale
    return scaled if bias is None else scaled + bias, mean, factor


def layer_norm_alone(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int, epsilon: float
) -> Tensor:  # fmt: skip
    """As :func:`layer_norm`, without its further outputs: torch does this in one step where the scale need not broadcast."""
    if scale.shape != x.shape[axis:] or (bias is not None and bias.shape != scale.shape):
        return layer_norm(x, scale, bias, axis=axis, epsilon=epsilon)[0]
    return F.layer_norm(x, scale.shape, scale, bias, epsilon)


def rms_norm(x: Tensor, scale: Tensor, *, axis: int, epsilon: float) -> Tensor:
    """All axes from ``axis`` on, not centred."""
    return x * torch.rsqrt(x.square().mean(_from(x, axis), keepdim=True) + epsilon) * scale


def skip_layer_norm(
    x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None, skip_bias: Tensor | None = None, *, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The last axis of a sum; the sum itself is the last output."""
    total = x + skip if skip_bias is None else x + skip + skip_bias
    return *layer_norm(total, scale, bias, axis=-1, epsilon=epsilon), total


def lp_norm(x: Tensor, *, axis: int, p: int) -> Tensor:
    """Divided by the norm along an axis; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def mean_variance_norm(x: Tensor, *, axes: list[int]) -> Tensor:
    """Centred along these axes, and divided by the deviation."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + MEAN_VARIANCE_EPSILON)


def local_response_norm(x: Tensor, *, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """Divided by a power of the squares in a window of channels; an even window reaches one channel further up than down."""
    before = (size - 1) // 2
    around = [0, 0] * (x.dim() - 2) + [before, size - 1 - before]
    squares = F.pad(x.square(), around).unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * squares) ** beta


def _standardised(x: Tensor, axes: tuple[int, ...], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """With a mean of 0 and a variance of 1 along the axes; the mean, and the factor."""
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    factor = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    return centred * factor, mean, factor


def _from(x: Tensor, axis: int) -> tuple[int, ...]:
    """An axis and all behind it."""
    return tuple(range(axis % x.dim(), x.dim()))


def make_group_norm(view: NodeView) -> Made | None:
    """Scale and bias are one per group in the first version of the operator, which the next one withdrew."""
    keywords = {"num_groups": view.attributes["num_groups"], "epsilon": view.attributes.get("epsilon", 1e-5)}
    return Computed(partial(group_norm, per_group=view.opset < 21), view, keywords)


def make_layer_norm(view: NodeView) -> Made | None:
    """Mean and factor are only computed where they are used."""
    function, gives = (layer_norm, 3) if any(view.outputs[1:]) else (layer_norm_alone, 1)
    return made(function, gives=gives, axis=-1, epsilon=1e-5)(view)


def make_lp_norm(view: NodeView) -> Made | None:
    """None for norms that the standard does not have."""
    p = view.attributes.get("p", 2)
    return Computed(lp_norm, view, {"axis": view.attributes.get("axis", -1), "p": p}) if p in (1, 2) else None


def make_local_response_norm(view: NodeView) -> Made | None:
    """The size of the window has no default."""
    keywords = {name: view.attributes.get(name, default) for name, default in LRN_DEFAULTS.items()}
    size = view.attributes["size"]
    return Computed(local_response_norm, view, {"size": size, **keywords}) if size > 0 else None


LRN_DEFAULTS = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}
"""Defaults of the standard for LRN."""

NORMALISATION: dict[str, Maker] = {
    "InstanceNormalization": made(instance_norm, epsilon=1e-5),
    "GroupNormalization": make_group_norm,
    "LayerNormalization": make_layer_norm,
    "RMSNormalization": made(rms_norm, axis=-1, epsilon=1e-5),
    "SimplifiedLayerNormalization": made(rms_norm, axis=-1, epsilon=1e-5),
    "LpNormalization": make_lp_norm,
    "MeanVarianceNormalization": made(mean_variance_norm, axes=[0, 2, 3]),
    "LRN": make_local_response_norm,
    "com.microsoft::SkipLayerNormalization": made(skip_layer_norm, gives=4, epsilon=1e-12),
}
"""Operators that normalise -> their makers."""
