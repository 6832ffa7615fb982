"""A small U-Net (Ronneberger et al. 2015) with a dilated middle, two outputs, and convolutions of four kinds."""

import torch
from torch import Tensor, nn

CLASSES = ("background", "disc", "square", "triangle")


def _conv(in_channels: int, out_channels: int, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution that keeps the size."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """``(N, 1, H, W)`` images, H and W multiples of 4 -> a dictionary.

    ``mask`` ``(N, 4, H, W)`` are the logits of each pixel's class, ``largest`` ``(N, 3)`` those of the shape that covers most
    pixels: an auxiliary output, from the middle of the network.
    """

    def __init__(self, widths: tuple[int, int, int] = (12, 16, 16)) -> None:
        super().__init__()
        first, second, third = widths
        self.down1 = nn.Sequential(_conv(1, first), _conv(first, first))
        self.down2 = _conv(first, second)
        self.pool = nn.MaxPool2d(2)
        self.middle = nn.Sequential(
            _conv(second, third), _conv(third, third, dilation=2), _conv(third, third, dilation=3)
        )
        self.up2 = nn.ConvTranspose2d(third, second, 2, stride=2)
        self.join2 = _conv(2 * second, second)
        self.up1 = nn.ConvTranspose2d(second, first, 4, stride=2, padding=1)
        self.join1 = _conv(2 * first, first)
        self.mask = nn.Conv2d(first, len(CLASSES), 1)
        self.largest = nn.Linear(third, len(CLASSES) - 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.down1(images)
        coarse = self.down2(self.pool(fine))
        deep = self.middle(self.pool(coarse))
        x = self.join2(torch.cat([self.up2(deep), coarse], 1))
        x = self.join1(torch.cat([self.up1(x), fine], 1))
        return {"mask": self.mask(x), "largest": self.largest(deep.mean((2, 3)))}


def unet() -> UNet:
    """A new network with random weights; ``run.py`` beside this file trains one."""
    return UNet()
