"""The geometry of an ONNX node that convolves, from its attributes and the shapes of its weight and input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from convrewrite.conv import ConvSpec, Size, as_size
from convrewrite.graph import Volume

MOST_AXES = 3
"""Most spatial axes of the convolutions that have a description."""


@dataclass(frozen=True, slots=True)
class ConvOperator:
    """How an operator takes its inputs: positions of weight and bias, None where it has none of known layout."""

    weight: int | None = 1
    bias: int | None = 2
    transposed: bool = False
    channels_last: bool = False


def geometry(
    node: onnx.NodeProto, operator: ConvOperator, weight: Sequence[int] | None, source: Sequence[int] | None
) -> tuple[ConvSpec | None, tuple[Size, ...]]:
    """The geometry of a node, and the size of its input for one example; None and an empty tuple where they are not known.

    ``weight`` and ``source`` are the shapes of its weight and its input. Where it pads one side more than the other, the
    input counts as already padded: that costs the same.
    """
    if weight is None or not 3 <= len(weight) <= 2 + MOST_AXES or min(weight) < 1:
        return None, ()
    try:
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        return _geometry(node, operator, values, weight, source)
    except (TypeError, ValueError):  # attributes of other types than the operator's
        return None, ()


@dataclass(frozen=True, slots=True)
class _Layout:
    """What does not depend on the input; every sequence has a number per axis."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    bias: bool
    transposed: bool
    output_padding: tuple[int, ...]

    @classmethod
    def of(
        cls, values: Mapping[str, Any], weight: Sequence[int], operator: ConvOperator, bias: bool
    ) -> "_Layout | None":
        """None where the numbers do not fit each other."""
        axes, groups = len(weight) - 2, int(values.get("group", 1))
        stride, dilation = (tuple(values.get(name, (1,) * axes)) for name in ("strides", "dilations"))
        extra = tuple(values.get("output_padding", (0,) * axes))
        if groups < 1 or {len(stride), len(dilation), len(extra)} != {axes} or min(*stride, *dilation) < 1:
            return None
        first, second = (weight[0], weight[1] * groups) if operator.transposed else (weight[1] * groups, weight[0])
        if first % groups or second % groups:
            return None
        kernel = tuple(weight[2:])
        return cls(first, second, kernel, stride, dilation, groups, bias, operator.transposed, extra)

    @property
    def spans(self) -> tuple[int, ...]:
        """How many places the kernel reaches over along each axis, less one."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))


def _geometry(
    node: onnx.NodeProto,
    operator: ConvOperator,
    values: Mapping[str, Any],
    weight: Sequence[int],
    source: Sequence[int] | None,
) -> tuple[ConvSpec | None, tuple[Size, ...]]:
    layout = _Layout.of(values, weight, operator, _has(node, operator.bias))
    if layout is None:
        return None, ()
    size = _spatial(source, layout, channels_last=operator.channels_last or bool(values.get("channels_last")))
    if source is not None and size is None:
        return None, ()  # its weight is not laid out as it seemed
    begin, end = _pads(values, layout, size)
    padding = begin if begin == end else (0,) * len(begin)
    if size is not None and not layout.transposed:
        padded = tuple(n + before + after for n, before, after in zip(size, begin, end, strict=True))
        size = size if begin == end else padded
        if any(n <= span for n, span in zip(padded, layout.spans, strict=True)):
            size = None  # the kernel does not fit in: nothing comes out
    return _described(layout, padding, size)


def _has(node: onnx.NodeProto, position: int | None) -> bool:
    return position is not None and len(node.input) > position and node.input[position] != ""


def _spatial(source: Sequence[int] | None, layout: _Layout, *, channels_last: bool) -> tuple[int, ...] | None:
    """Extents of the input; None where they are not known, or its channels are not those of the weight."""
    if source is None or len(source) != len(layout.kernel) + 2:
        return None
    channels, extents = (source[-1], source[1:-1]) if channels_last else (source[1], source[2:])
    return tuple(extents) if channels == layout.in_channels and min(extents) > 0 else None


def _pads(values: Mapping[str, Any], layout: _Layout, size: tuple[int, ...] | None) -> tuple[tuple[int, ...], ...]:
    """What is added before and after on each axis; where that depends on a size that is not known, what a stride of 1 needs."""
    axes, automatic = len(layout.kernel), values.get("auto_pad", b"NOTSET")
    none = (0,) * axes
    if automatic in (b"NOTSET", b""):
        pads = tuple(values.get("pads", none * 2))
        return (pads[:axes], pads[axes:]) if len(pads) == 2 * axes else (none, none)
    if automatic not in (b"SAME_UPPER", b"SAME_LOWER") or layout.transposed:
        return none, none
    totals = layout.spans
    if size is not None:
        counted = zip(size, layout.stride, layout.spans, strict=True)
        totals = tuple(max((-(-n // s) - 1) * s + span + 1 - n, 0) for n, s, span in counted)
    less, more = tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
    return (less, more) if automatic == b"SAME_UPPER" else (more, less)


def _described(
    layout: _Layout, padding: tuple[int, ...], size: tuple[int, ...] | None
) -> tuple[ConvSpec, tuple[Size, ...]]:
    if len(layout.kernel) == MOST_AXES:
        volume = Volume(
            layout.in_channels, layout.out_channels, layout.kernel, layout.stride, padding, layout.dilation,
            layout.groups, layout.bias, layout.transposed,
        )  # fmt: skip
        return volume.spec(), () if size is None else (volume.input_size(size),)
    spec = ConvSpec(
        layout.in_channels, layout.out_channels, as_size(layout.kernel, 1), as_size(layout.stride, 1),
        as_size(padding, 0), as_size(layout.dilation, 1), layout.groups, layout.bias, transposed=layout.transposed,
        output_padding=as_size(layout.output_padding, 0), dims=len(layout.kernel),
    )  # fmt: skip
    return spec, () if size is None else (as_size(size, 1),)
