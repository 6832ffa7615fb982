"""Super-resolution by two: scaled residual blocks as in EDSR (Lim et al. 2017), a pixel shuffle as in ESPCN (Shi et al. 2016)."""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions without normalisation; their sum with the input is scaled down, which keeps training stable."""

    def __init__(self, channels: int, scaling: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scaling * self.conv2(F.relu(self.conv1(x)))


class SuperResolution(nn.Module):
    """``(N, 1, H, W)`` images in [0, 1] -> ``(N, 1, 2 H, 2 W)``: the bilinear image, and what it lacks."""

    def __init__(self, channels: int = 16, blocks: int = 2, scaling: float = 0.5) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, channels, 3, padding=1)
        self.body = nn.Sequential(*(Block(channels, scaling) for _ in range(blocks)))
        self.fuse = nn.Conv2d(channels, channels, 3, padding=1)
        self.expand = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.tail = nn.Conv2d(channels, 1, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(images)
        x = x + self.fuse(self.body(x))
        details = self.tail(F.relu(self.shuffle(self.expand(x))))
        return details + F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)


def super_resolution() -> SuperResolution:
    """A new network with random weights; ``run.py`` beside this file trains one."""
    return SuperResolution()
