"""Transposed convolution whose output is exactly ``stride`` times its input."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.conv import ConvSpec, Cost, PaddingMode, Size
from convrewrite.layers.geometry import Device, Padding, Pair, checked_pair, checked_size, checked_spec, plain_source


class TransposedConv2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with ``padding="same"``: ``(N, C, H, W)`` -> ``(N, O, stride * H, stride * W)``.

    "same" is the transpose, in the sense of linear algebra, of the convolution that "same" makes elsewhere in this
    package: what one layer takes apart the other puts back on the same pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 2,
        padding: Padding = "same",
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        output_padding: Pair = 0,
    ) -> None:
        """The shared order of arguments, which is not that of ``nn.ConvTranspose2d``.

        ``output_padding`` goes with ``padding="valid"`` or numbers: "same" sets it. Raises ValueError if it is given
        with "same", if it is not less than stride or dilation, and for a padding mode other than zeros.
        """
        owner = type(self).__name__
        spec = checked_spec(
            owner, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        extra = checked_pair(owner, "output_padding", output_padding, smallest=0)
        if padding_mode != "zeros":
            raise ValueError(f"{owner}: padding_mode: expected 'zeros', the only one here, found {padding_mode!r}")
        cropped = (0, 0)
        if isinstance(spec.padding, str):
            if extra != (0, 0):
                raise ValueError(f"{owner}: output_padding: padding='same' sets it; give padding as numbers with it")
            pads, extra, cropped = _same(spec)
        else:
            pads = spec.padding
        if any(e >= max(s, d) for e, s, d in zip(extra, spec.stride, spec.dilation, strict=True)):
            raise ValueError(f"{owner}: output_padding: expected less than stride or dilation, found {extra}")
        super().__init__(
            in_channels, out_channels, spec.kernel_size, spec.stride, pads, extra, groups, bias, spec.dilation,
            "zeros", device, dtype,
        )  # fmt: skip
        self.cropped = cropped

    @classmethod
    def from_conv(cls, conv: nn.ConvTranspose2d) -> Self:
        """A copy of a transposed convolution, its numbers included. Raises ValueError for any other module."""
        if not isinstance(conv, nn.ConvTranspose2d):
            raise ValueError(f"{cls.__name__}: expected an nn.ConvTranspose2d, found {type(conv).__name__}")
        conv = plain_source(cls.__name__, conv)
        spec = ConvSpec.of(conv)
        layer = cls(
            spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, spec.padding, spec.dilation,
            spec.groups, spec.bias, spec.padding_mode, conv.weight.device, conv.weight.dtype,
            output_padding=spec.output_padding,
        )  # fmt: skip
        layer.cropped = conv.cropped if isinstance(conv, TransposedConv2d) else (0, 0)
        with torch.no_grad():
            layer.weight.copy_(conv.weight)
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer.train(conv.training)

    def cost(self, input_size: Size) -> Cost:
        """Parameters, and MACs for one example of this height and width: one per weight and *input* position."""
        spec = ConvSpec.of(self)
        return spec.cost([checked_size(type(self).__name__, spec, input_size)])

    # Without the optional output_size of torch's class, which following with torch.fx would make a constant.
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """``(N, C, H, W)`` -> ``(N, O, H', W')``."""
        assert not isinstance(self.padding, str), "the constructor made it numbers"
        output = F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
        rows, columns = self.cropped
        if rows:
            output = output[..., :-rows, :]
        return output[..., :-columns] if columns else output

    def extra_repr(self) -> str:
        """``nn.ConvTranspose2d``'s, and what is cropped."""
        cropped = f", cropped={self.cropped}" if any(self.cropped) else ""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return text + cropped


def _same(spec: ConvSpec) -> tuple[Size, Size, Size]:
    """Padding, output padding, and what is cropped at bottom and right, for ``stride * size``.

    The output padding ``stride - 1 - (total is odd)`` is -1 for an even kernel at stride 1: there a line is cropped.
    """
    totals = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
    extra = [s - 1 - total % 2 for s, total in zip(spec.stride, totals, strict=True)]
    return (
        (totals[0] // 2, totals[1] // 2),
        (max(extra[0], 0), max(extra[1], 0)),
        (max(-extra[0], 0), max(-extra[1], 0)),
    )
