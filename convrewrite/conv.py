"""The geometry of a convolution under PyTorch's own names, its kind, and its cost.

One :class:`ConvSpec` describes ``nn.Conv2d`` and ``nn.ConvTranspose2d`` alike. Kernels are handled in one *canonical*
layout, ``(out_channels, in_channels / groups, kh, kw)``, also for transposed convolutions, whose modules store
``(in_channels, out_channels / groups, kh, kw)``: :func:`canonical_kernel` and :func:`module_weight` go between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor, nn

Size = tuple[int, int]
"""Height and width."""

Conv = nn.Conv2d | nn.ConvTranspose2d | nn.Conv1d | nn.ConvTranspose1d
CONV_TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.ConvTranspose1d)
TRANSPOSED_TYPES = (nn.ConvTranspose2d, nn.ConvTranspose1d)
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

PADDING_MODES: dict[PaddingMode, str] = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}
"""Names of ``nn.Conv2d`` -> names of ``F.pad``."""

NO_CONVOLUTION = "the model has no convolution; there is nothing to rewrite"

READABLE = ("in_channels", "out_channels", "kernel_size", "stride", "dilation")
"""Attributes of a convolution that what replaces it has too: a forward may compute paddings and lengths from them."""


class Kind(StrEnum):
    """What a convolution is. ``separable`` marks both halves of a depthwise convolution directly followed by its pointwise."""

    STANDARD = "standard"
    POINTWISE = "pointwise"
    ASYMMETRIC = "asymmetric"
    DILATED = "dilated"
    DEPTHWISE = "depthwise"
    GROUPED = "grouped"
    SEPARABLE = "separable"
    TRANSPOSED = "transposed"
    DYNAMIC = "dynamic"


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters, and MACs for one example (one MAC = one multiply-accumulate; the bias adds parameters, no MACs)."""

    parameters: int = 0
    macs: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.macs + other.macs)


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """The geometry of one convolution, as ``nn.Conv2d`` and ``nn.ConvTranspose2d`` name it.

    One of one dimension, ``dims`` 1, is described as a two-dimensional one on inputs of height 1: its kernel is 1 x k.

    A dynamic convolution has several ``kernels``, of which each example goes through a mixture; ``out_channels`` are then
    those of all kernels, stacked within each group.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = (1, 1)
    padding: Size | str = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    bias: bool = True
    padding_mode: PaddingMode = "zeros"
    transposed: bool = False
    output_padding: Size = (0, 0)
    kernels: int = 1
    dims: int = 2

    @classmethod
    def of(cls, conv: Conv) -> "ConvSpec":
        """The geometry of an existing module."""
        dims = len(conv.kernel_size)

        def size(values: Sequence[int] | int, flat: int) -> Size:
            """A single number is that of every axis, as in torch."""
            return as_size([values] * dims if isinstance(values, int) else [*values, *values][:dims], flat)

        return cls(
            in_channels=int(conv.in_channels),  # of numpy, too
            out_channels=int(conv.out_channels),
            kernel_size=as_size(conv.kernel_size, 1),
            stride=size(conv.stride, 1),
            padding=conv.padding if isinstance(conv.padding, str) else size(conv.padding, 0),
            dilation=size(conv.dilation, 1),
            groups=int(conv.groups),
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            transposed=isinstance(conv, TRANSPOSED_TYPES),
            output_padding=size(conv.output_padding, 0),
            dims=dims,
        )

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """The canonical shape: (out_channels, in_channels / groups, kh, kw)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def patch(self) -> int:
        """Numbers in a patch of one group: the unknowns of a filter."""
        _, channels, height, width = self.kernel_shape
        return channels * height * width

    @property
    def extents(self) -> Size:
        """Height and width that the kernel covers with its dilation."""
        height, width = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return height, width

    @property
    def is_dilated(self) -> bool:
        """Whether the dilation moves any tap; along an extent of one it does not."""
        return self.extents != self.kernel_size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the module's ``weight``."""
        extents = self.kernel_size[2 - self.dims :]
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *extents)
        return (self.out_channels, self.in_channels // self.groups, *extents)

    @property
    def parameters(self) -> int:
        """Numbers in weight and bias."""
        o, c, kh, kw = self.kernel_shape
        return o * c * kh * kw + (o if self.bias else 0)

    @property
    def mixed(self) -> "ConvSpec":
        """The convolution that one example is convolved with."""
        return replace(self, out_channels=self.out_channels // self.kernels, kernels=1)

    @property
    def per_group(self) -> "ConvSpec":
        """The convolution that each group is by itself."""
        return replace(
            self,
            in_channels=self.in_channels // self.groups,
            out_channels=self.out_channels // self.groups,
            groups=1,
        )

    def padding_pairs(self) -> tuple[Size, Size]:
        """((top, bottom), (left, right)) zeros or mirrored pixels added around a non-transposed input."""
        if self.padding == "valid":
            return ((0, 0), (0, 0))
        if self.padding == "same":
            totals = [extent - 1 for extent in self.extents]
            top, left = (total // 2 for total in totals)
            return ((top, totals[0] - top), (left, totals[1] - left))
        assert not isinstance(self.padding, str)
        return ((self.padding[0],) * 2, (self.padding[1],) * 2)

    def output_size(self, input_size: Size) -> Size:
        """Height and width of the output for an input of this height and width."""
        pads = [sum(pair) for pair in self.padding_pairs()]
        if self.transposed:
            sizes = [
                (n - 1) * s - p + span + extra
                for n, s, p, span, extra in zip(
                    input_size, self.stride, pads, self.extents, self.output_padding, strict=True
                )
            ]
        else:
            sizes = [
                (n + p - span) // s + 1
                for n, p, span, s in zip(input_size, pads, self.extents, self.stride, strict=True)
            ]
        return (sizes[0], sizes[1])

    def macs(self, input_size: Size) -> int:
        """Multiply-accumulates of one example; a transposed convolution multiplies once per *input* position.

        Several kernels, and their biases, are mixed once per example.
        """
        height, width = input_size if self.transposed else self.output_size(input_size)
        o, c, kh, kw = self.mixed.kernel_shape
        mixing = self.parameters if self.kernels > 1 else 0
        return height * width * o * c * kh * kw + mixing

    def cost(self, input_sizes: Sequence[Size]) -> Cost:
        """Parameters once, MACs for every call."""
        return Cost(self.parameters, sum(self.macs(size) for size in input_sizes))

    def build(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Conv:
        """A module of this geometry; its weights are not yet meaningful."""

        def own(values: Size) -> Any:
            return values[2 - self.dims :]

        if self.transposed:
            assert not isinstance(self.padding, str)
            kind: Any = nn.ConvTranspose1d if self.dims == 1 else nn.ConvTranspose2d
            return kind(
                self.in_channels, self.out_channels, own(self.kernel_size), own(self.stride), own(self.padding),
                own(self.output_padding), self.groups, self.bias, own(self.dilation), device=device, dtype=dtype,
            )  # fmt: skip
        kind = nn.Conv1d if self.dims == 1 else nn.Conv2d
        padding = self.padding if isinstance(self.padding, str) else own(self.padding)
        return kind(
            self.in_channels, self.out_channels, own(self.kernel_size), own(self.stride), padding,
            own(self.dilation), self.groups, self.bias, self.padding_mode, device=device, dtype=dtype,
        )  # fmt: skip

    def describe(self) -> str:
        """One short line: ``64->128 3x3 s2 p1 d2 g4 reflect``; what is at its default is left out."""

        def text(size: Size) -> str:
            return str(size[1]) if self.dims == 1 or size[0] == size[1] else f"{size[0]}x{size[1]}"

        kernel = text(self.kernel_size) if self.dims == 1 else f"{self.kernel_size[0]}x{self.kernel_size[1]}"
        parts = [f"{self.in_channels}->{self.mixed.out_channels} {kernel}"]
        if self.stride != (1, 1):
            parts.append("s" + text(self.stride))
        if self.padding != (0, 0):
            parts.append(self.padding if isinstance(self.padding, str) else "p" + text(self.padding))
        if self.dilation != (1, 1):
            parts.append("d" + text(self.dilation))
        if self.groups != 1:
            parts.append(f"g{self.groups}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        if self.transposed:
            parts.append("transposed")
        if self.kernels != 1:
            parts.append(f"{self.kernels} kernels")
        return " ".join(parts)


def classify(spec: ConvSpec) -> Kind:
    """The kind a geometry has by itself; ``separable`` depends on what surrounds it (see sites.py)."""
    if spec.kernels > 1:
        return Kind.DYNAMIC
    if spec.transposed:
        return Kind.TRANSPOSED
    if spec.groups == spec.in_channels and spec.groups > 1:
        return Kind.DEPTHWISE
    if spec.groups > 1:
        return Kind.GROUPED
    if spec.kernel_size == (1, 1):
        return Kind.POINTWISE
    if spec.is_dilated:
        return Kind.DILATED
    if spec.dims == 2 and spec.kernel_size[0] != spec.kernel_size[1] and 1 in spec.kernel_size:
        return Kind.ASYMMETRIC
    return Kind.STANDARD


def canonical_kernel(weight: Tensor, spec: ConvSpec) -> Tensor:
    """A module's weight -> ``(out_channels, in_channels / groups, kh, kw)``."""
    weight = planar(weight, spec)
    if not spec.transposed:
        return weight
    g, (kh, kw) = spec.groups, spec.kernel_size
    grouped = weight.reshape(g, spec.in_channels // g, spec.out_channels // g, kh, kw)
    return grouped.transpose(1, 2).reshape(spec.kernel_shape)


def module_weight(kernel: Tensor, spec: ConvSpec) -> Tensor:
    """``(out_channels, in_channels / groups, kh, kw)`` -> the layout in which the module stores its weight."""
    if not spec.transposed:
        return kernel.reshape(spec.weight_shape)
    g, (kh, kw) = spec.groups, spec.kernel_size
    grouped = kernel.reshape(g, spec.out_channels // g, spec.in_channels // g, kh, kw)
    return grouped.transpose(1, 2).reshape(spec.weight_shape)


def show_geometry(original: nn.Module, module: nn.Module) -> None:
    """Give ``module``, which replaces ``original``, those of the attributes ``READABLE`` that only the original has."""
    for name in READABLE:
        if hasattr(original, name) and not hasattr(module, name):
            setattr(module, name, getattr(original, name))


def planar(values: Tensor, spec: ConvSpec) -> Tensor:
    """``(N, C, L)`` of a one-dimensional convolution -> ``(N, C, 1, L)``; two-dimensional values stay as they are."""
    return values.unsqueeze(-2) if spec.dims == 1 else values


def as_size(values: Sequence[int] | int, flat: int) -> Size:
    """One or two numbers as height and width; a single number in a sequence is a width, with the height ``flat``."""
    if isinstance(values, int):
        return (values, values)
    return (int(values[0]), int(values[1])) if len(values) == 2 else (flat, int(values[0]))


def within_strides(
    pads: Sequence[int], output_padding: Sequence[int], stride: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Pads (all begins, then all ends) and output padding of a transposed convolution that are the same as these to ONNX.

    torch takes an output padding as large as the stride where there is a dilation, which onnxruntime opens and does not run: then
    less is cut from the end instead.
    """
    axes = len(output_padding)
    begins, ends = list(pads[:axes]), list(pads[axes:])
    if all(n < step for n, step in zip(output_padding, stride, strict=True)):
        return [*begins, *ends], list(output_padding)
    moved = [min(n, end) for n, end in zip(output_padding, ends, strict=True)]
    fewer = [end - n for end, n in zip(ends, moved, strict=True)]
    return [*begins, *fewer], [n - taken for n, taken in zip(output_padding, moved, strict=True)]
