"""Convolutions that are called as functions: which functions these are, and the geometry of one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from convrewrite.conv import ConvSpec, Size

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ANY = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_aten = torch.ops.aten

ARGUMENTS: dict[Any, tuple[str, ...]] = {
    torch.conv2d: _CONV,
    torch.nn.functional.conv2d: _CONV,
    _aten.conv2d: _CONV,
    _aten.conv2d.default: _CONV,
    _aten.conv2d.padding: _CONV,
    torch.conv_transpose2d: _TRANSPOSED,
    torch.nn.functional.conv_transpose2d: _TRANSPOSED,
    _aten.conv_transpose2d: _TRANSPOSED,
    _aten.conv_transpose2d.input: _TRANSPOSED,
    torch.convolution: _ANY,
    _aten.convolution: _ANY,
    _aten.convolution.default: _ANY,
}
"""Every function that convolves -> the names of its arguments in order."""

GEOMETRY = ("stride", "padding", "dilation", "transposed", "output_padding")
"""Arguments that must be constants for a call to be a module. The number of groups follows from the channels."""


def named_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of one of ``ARGUMENTS``, by name."""
    named = dict(zip(ARGUMENTS[function], args, strict=False)) | dict(kwargs)
    if "transposed" not in named:
        named["transposed"] = ARGUMENTS[function] is _TRANSPOSED
    return named


def is_planar(named: Mapping[str, Any]) -> bool:
    """Whether a call is two-dimensional: ``convolution`` itself takes any number of axes."""
    return bool(named["weight"].dim() == 4)


def spec_of_call(named: Mapping[str, Any]) -> ConvSpec:
    """The geometry of a call; a kernel per example counts its examples as groups, as the call itself does."""
    weight, groups = named["weight"], int(named.get("groups", 1))
    first, second, kh, kw = (int(n) for n in weight.shape)
    transposed = bool(named["transposed"])
    outputs, inputs = (second * groups, first) if transposed else (first, second * groups)
    padding = named.get("padding", 0)
    return ConvSpec(
        inputs, outputs, (kh, kw), _pair(named.get("stride", 1)),
        padding if isinstance(padding, str) else _pair(padding), _pair(named.get("dilation", 1)), groups,
        named.get("bias") is not None, "zeros", transposed, _pair(named.get("output_padding", 0)),
    )  # fmt: skip


def _pair(value: int | Sequence[int]) -> Size:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return (int(pair[0]), int(pair[-1]))
