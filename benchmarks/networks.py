"""Networks of well-known shapes with random weights, for measuring time and memory where weights do not matter."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class Block(nn.Module):
    """The basic residual block (He et al. 2016)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += skip
        return self.relu(y)


class Bottleneck(nn.Module):
    """The residual block of deeper networks, with its stride at the 3 x 3 convolution."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        y += skip
        return self.relu(y)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """``(N, 3, 224, 224)`` -> ``(N, 1000)``: four stages of so many blocks."""

    def __init__(self, block: type[Block] | type[Bottleneck], blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, stages = 64, []
        for index, count in enumerate(blocks):
            width, stage = 64 << index, []
            for number in range(count):
                stage.append(block(channels, width, 2 if index and not number else 1))
                channels = block.expansion * width
            stages.append(nn.Sequential(*stage))
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.layers(x)).flatten(1))


class Vgg16(nn.Module):
    """The thirteen convolutions of VGG-16 (Simonyan and Zisserman 2015) with BatchNorm, and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.features(x)).flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(ResNet, Block, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, Block, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "vgg16": Vgg16,
}


def network_and_inputs(name: str, inputs: int, size: int) -> tuple[nn.Module, Tensor]:
    """A network in eval mode, and smoothed noise ``(inputs, 3, size, size)`` for it; both are the same in every run."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    images = smooth_noise(inputs, size)
    with torch.no_grad():
        model.train()
        model(images[:16])  # gives the BatchNorms statistics of their own, as training would
        model.eval()
    return model, images


def smooth_noise(count: int, size: int) -> Tensor:
    """Images whose neighbouring pixels are alike, so that covariances are not the identity."""
    coarse = torch.randn(count, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    fine = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.2 * fine
