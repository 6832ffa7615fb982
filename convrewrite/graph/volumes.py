"""Three-dimensional convolutions, which are shown with their cost and never rewritten.

Each is described by a flat convolution of the same cost, with its first two axes merged into one, and by a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from convrewrite.conv import ConvSpec, Size
from convrewrite.values import shape_text

VOLUME_TYPES = (nn.Conv3d, nn.ConvTranspose3d)
REFUSAL = "three-dimensional convolutions are not rewritten"


@dataclass(frozen=True, slots=True)
class VolumeSpec(ConvSpec):
    """A flat stand-in for a three-dimensional convolution: only its cost and its text mean anything."""

    text: str = ""

    def describe(self) -> str:
        """One short line, as other convolutions have it: ``3->8 3x3x3 s2 p1``."""
        return self.text


@dataclass(frozen=True, slots=True)
class Volume:
    """The geometry of a three-dimensional convolution; every sequence has three numbers."""

    in_channels: int
    out_channels: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int] | str
    dilation: Sequence[int]
    groups: int
    bias: bool
    transposed: bool

    @classmethod
    def of(cls, conv: nn.Conv3d | nn.ConvTranspose3d) -> "Volume":
        """The geometry of a module."""
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
            conv.padding, conv.dilation, conv.groups, conv.bias is not None, isinstance(conv, nn.ConvTranspose3d),
        )  # fmt: skip

    def spec(self) -> VolumeSpec:
        """The flat stand-in."""
        depth, height, width = self.kernel_size
        return VolumeSpec(
            self.in_channels, self.out_channels, (depth * height, width), groups=self.groups, bias=self.bias,
            transposed=self.transposed, text=self._text(),
        )  # fmt: skip

    def input_size(self, shape: Sequence[int]) -> Size:
        """The input size at which the stand-in costs what this convolution costs on ``(..., D, H, W)``."""
        if self.transposed:  # it multiplies once per input position
            return (shape[-3] * shape[-2], shape[-1])
        depth, height, width = (self._output(axis, shape[axis - 3]) for axis in range(3))
        spans = (self.kernel_size[0] * self.kernel_size[1] - 1, self.kernel_size[2] - 1)
        return (depth * height + spans[0], width + spans[1])

    def _output(self, axis: int, size: int) -> int:
        span = self.dilation[axis] * (self.kernel_size[axis] - 1)
        if isinstance(self.padding, str):
            return size if self.padding == "same" else (size - span - 1) // self.stride[axis] + 1
        return (size + 2 * self.padding[axis] - span - 1) // self.stride[axis] + 1

    def _text(self) -> str:
        parts = [f"{self.in_channels}->{self.out_channels} {shape_text(self.kernel_size)}"]
        for letter, values, usual in (("s", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)):
            if isinstance(values, str):
                parts.append(values)
            elif any(value != usual for value in values):
                alike = len(set(values)) == 1
                parts.append(letter + (str(values[0]) if alike else shape_text(values)))
        parts += [f"g{self.groups}"] if self.groups > 1 else []
        parts += ["transposed"] if self.transposed else []
        return " ".join(parts)
