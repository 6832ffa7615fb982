"""One instance of every layer, by name, with any of the shared arguments changed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from convrewrite import layers

LAYERS: dict[str, Callable[..., Any]] = {
    "standard": layers.StandardConv2d,
    "pointwise": layers.PointwiseConv2d,
    "asymmetric": layers.AsymmetricConv2d,
    "horizontal first": partial(layers.AsymmetricConv2d, order="horizontal-first", rank=3),
    "dilated": layers.DilatedConv2d,
    "depthwise": layers.DepthwiseConv2d,
    "grouped": layers.GroupedConv2d,
    "grouped, mixed": partial(layers.GroupedConv2d, mix=True, rank=3),
    "separable": partial(layers.SeparableConv2d, multiplier=2),
    "pointwise first": partial(layers.SeparableConv2d, order="pointwise-first"),
    "transposed": layers.TransposedConv2d,
    "dynamic": partial(layers.DynamicConv2d, temperature=0.5, reduction=2),
}
INPUTS, OUTPUTS = 8, 16


def build(name: str, **changes: Any) -> nn.Module:
    """A layer from 8 to 16 channels; arguments that PointwiseConv2d does not have are left out for it."""
    if name == "pointwise":
        changes = {key: value for key, value in changes.items() if key not in ("kernel_size", "dilation")}
    layer: nn.Module = LAYERS[name](INPUTS, OUTPUTS, **changes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    return layer
