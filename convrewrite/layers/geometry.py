"""The arguments all layers share: checked, made pairs, and taken over from an existing convolution.

What a constructor or ``from_conv`` refuses is a ``ValueError``, as in ``torch.nn``.
"""

import copy
from typing import TypedDict, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from convrewrite.conv import PADDING_MODES, ConvSpec, PaddingMode, Size

Pair = int | Size
"""One number for both axes, or (height, width)."""

Padding = int | Size | str
"""``"same"``, ``"valid"``, or the pixels added on both sides of each axis."""

Device = torch.device | str | None

Source = TypeVar("Source", nn.Conv2d, nn.ConvTranspose2d)
"""A trained convolution that a layer is made from."""


class Geometry(TypedDict):
    """The constructor arguments that every layer has in common."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: int
    bias: bool
    padding_mode: PaddingMode
    device: Device
    dtype: torch.dtype | None


def checked_spec(
    owner: str,
    in_channels: int,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    bias: bool,
    padding_mode: PaddingMode,
) -> ConvSpec:
    """The geometry these arguments describe. ``padding="same"`` stays a word, and applies at every stride.

    Raises ValueError, naming ``owner`` and the argument.
    """
    for name, number in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        require_count(owner, name, number)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"{owner}: {name}: expected a multiple of groups={groups}, found {channels}")
    require_flag(owner, "bias", bias)
    if padding_mode not in list(PADDING_MODES):  # a list takes what a dictionary cannot be asked for
        known = ", ".join(PADDING_MODES)
        raise ValueError(f"{owner}: padding_mode: expected one of {known}, found {padding_mode!r}")
    return ConvSpec(
        in_channels, out_channels, checked_pair(owner, "kernel_size", kernel_size),
        checked_pair(owner, "stride", stride), _padding(owner, padding), checked_pair(owner, "dilation", dilation),
        groups, bias, padding_mode,
    )  # fmt: skip


def require_count(owner: str, name: str, number: int) -> None:
    """Raise ValueError unless this is a whole number from 1."""
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{owner}: {name}: expected a whole number from 1, found {number!r}")


def require_flag(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless this is true or false: of a word, ``"False"`` too would be true."""
    if value not in (True, False, None):
        raise ValueError(f"{owner}: {name}: expected True or False, found {value!r}")


def _padding(owner: str, padding: Padding) -> Size | str:
    if not isinstance(padding, str):
        return checked_pair(owner, "padding", padding, smallest=0)
    if padding not in ("same", "valid"):
        raise ValueError(f"{owner}: padding: expected 'same', 'valid' or numbers, found {padding!r}")
    return padding if padding == "same" else (0, 0)


def checked_pair(owner: str, name: str, value: Pair, smallest: int = 1) -> Size:
    """One or two whole numbers as (height, width); raises ValueError for anything else."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(number, int) and number >= smallest for number in pair):
        raise ValueError(f"{owner}: {name}: expected one or two whole numbers from {smallest}, found {value!r}")
    return (pair[0], pair[1])


def checked_size(owner: str, spec: ConvSpec, input_size: Size) -> Size:
    """A height and width that a convolution takes; raises ValueError for anything else."""
    size = checked_pair(owner, "input_size", input_size)
    if min(spec.output_size(size)) < 1:
        raise ValueError(
            f"{owner}: input_size: expected planes that {spec.describe()} makes an output of, found {size[0]}x{size[1]}"
        )
    return size


def reversed_margins(spec: ConvSpec) -> list[int]:
    """The padding in the order of ``F.pad``: left, right, top, bottom."""
    (top, bottom), (left, right) = spec.padding_pairs()
    return [left, right, top, bottom]


def require_conv2d(owner: str, conv: nn.Module) -> nn.Conv2d:
    """As :func:`plain_source`, for an ``nn.Conv2d``; raises ValueError for any other module."""
    if isinstance(conv, nn.ConvTranspose2d):
        raise ValueError(f"{owner}: expected an nn.Conv2d, found an nn.ConvTranspose2d; TransposedConv2d takes these")
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"{owner}: expected an nn.Conv2d, found {type(conv).__name__}")
    return plain_source(owner, conv)


def plain_source(owner: str, conv: Source) -> Source:
    """``conv`` itself, once it is certain that it is plain; a copy of one that is parametrized, with the weights that it computes
    in eval mode: reading them in training changes the state of a spectral norm. Raises ValueError."""
    if parametrize.is_parametrized(conv):
        conv = copy.deepcopy(conv)
        conv.get_submodule("parametrizations").eval()
    _require_plain(owner, conv)
    return conv


def _require_plain(owner: str, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Raise ValueError unless the convolution computes what torch's computes, from the numbers that it holds now."""
    changed = [name for name in ("forward", "_conv_forward") if hasattr(conv, name) and not _is_known(conv, name)]
    if changed:
        raise ValueError(
            f"{owner}: expected a plain convolution, found {type(conv).__name__}, which has its own {changed[0]}; "
            "build the layer with its constructor and set its weights"
        )
    for name in ("weight", "bias"):
        if name in vars(conv) and conv._forward_pre_hooks:  # neither a parameter nor a buffer, nor None
            raise ValueError(
                f"{owner}: {name}: expected numbers that stay, found some that a hook computes before every call, which may be "
                "out of date; let torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm put them in place first"
            )
    if nn.parameter.is_lazy(conv.weight):
        raise ValueError(
            f"{owner}: weight: expected numbers, found none yet; call the convolution once on an input first"
        )
    shape = ConvSpec.of(conv).weight_shape
    if conv.weight.shape != shape:
        raise ValueError(
            f"{owner}: weight: expected {shape} by its attributes, found {tuple(conv.weight.shape)}; set in_channels, "
            "out_channels, groups and kernel_size to what it is"
        )


def _is_known(conv: nn.Module, name: str) -> bool:
    """Whether this method is torch's or this package's, in a class of whatever module, and none that was put on the instance."""
    defined_in = getattr(type(conv), name).__module__
    return name not in vars(conv) and defined_in.startswith(("torch.nn.modules.conv", "convrewrite.layers"))


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """Everything of a convolution but its numbers."""
    spec = ConvSpec.of(conv)
    return Geometry(
        in_channels=spec.in_channels, out_channels=spec.out_channels, kernel_size=spec.kernel_size, stride=spec.stride,
        padding=spec.padding, dilation=spec.dilation, groups=spec.groups, bias=spec.bias,
        padding_mode=spec.padding_mode, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
