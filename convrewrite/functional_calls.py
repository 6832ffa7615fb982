"""Convolutions that are called as functions: which functions these are, and the geometry of one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from convrewrite.conv import ConvSpec, Size
from convrewrite.volumetric import Volume

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ANY = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_aten = torch.ops.aten

ARGUMENTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    **dict.fromkeys((_aten.conv1d, _aten.conv1d.default, _aten.conv1d.padding), _CONV),
    **dict.fromkeys((_aten.conv2d, _aten.conv2d.default, _aten.conv2d.padding), _CONV),
    **dict.fromkeys((_aten.conv3d, _aten.conv3d.default, _aten.conv3d.padding), _CONV),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED),
    **dict.fromkeys((_aten.conv_transpose1d, _aten.conv_transpose1d.default), _TRANSPOSED),
    **dict.fromkeys((_aten.conv_transpose2d, _aten.conv_transpose2d.input), _TRANSPOSED),
    **dict.fromkeys((_aten.conv_transpose3d, _aten.conv_transpose3d.input), _TRANSPOSED),
    **dict.fromkeys((torch.convolution, _aten.convolution, _aten.convolution.default), _ANY),
}
"""Every function that convolves -> the names of its arguments in order. Those of ``torch.nn.functional`` are torch's own."""

GEOMETRY = ("stride", "padding", "dilation", "transposed", "output_padding")
"""Arguments that must be constants for a call to be a module. The number of groups follows from the channels."""


def named_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of one of ``ARGUMENTS``, by name."""
    named = dict(zip(ARGUMENTS[function], args, strict=False)) | dict(kwargs)
    if "transposed" not in named:
        named["transposed"] = ARGUMENTS[function] is _TRANSPOSED
    return named


def geometry_of_call(named: Mapping[str, Any]) -> ConvSpec | Volume:
    """The geometry of a call; a kernel per example counts its examples as groups, as the call itself does."""
    weight, groups, transposed = named["weight"], int(named.get("groups", 1)), bool(named["transposed"])
    first, second, *extents = (int(n) for n in weight.shape)
    outputs, inputs = (second * groups, first) if transposed else (first, second * groups)
    axes, padding = len(extents), named.get("padding", 0)

    def numbers(name: str, default: int) -> list[int]:
        value = named.get(name, default)
        values = [value] if isinstance(value, int) else [int(n) for n in value]
        return values * axes if len(values) == 1 else values

    around = padding if isinstance(padding, str) else numbers("padding", 0)
    bias = named.get("bias") is not None
    if axes == 3:
        stride, dilation = numbers("stride", 1), numbers("dilation", 1)
        return Volume(inputs, outputs, extents, stride, around, dilation, groups, bias, transposed)
    return ConvSpec(
        inputs, outputs, _size(extents, 1), _size(numbers("stride", 1), 1),
        around if isinstance(around, str) else _size(around, 0), _size(numbers("dilation", 1), 1), groups, bias,
        "zeros", transposed, _size(numbers("output_padding", 0), 0), dims=axes,
    )  # fmt: skip


def _size(values: Sequence[int], flat: int) -> Size:
    """Height and width; of one dimension the height is ``flat``."""
    return (values[0], values[1]) if len(values) == 2 else (flat, values[0])
