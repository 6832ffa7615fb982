"""Networks of well-known shapes with random weights, for measuring time and memory where weights do not matter."""

import itertools

import torch
from torch import Tensor, nn

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class Block(nn.Module):
    """The basic residual block of ResNet-18 (He et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            skip = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(skip, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += skip
        return self.relu(y)


class ResNet18(nn.Module):
    """``(N, 3, 224, 224)`` -> ``(N, 1000)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        widths = (64, 64, 128, 256, 512)
        self.layers = nn.Sequential(
            *(nn.Sequential(Block(a, b, 1 if a == b else 2), Block(b, b, 1)) for a, b in itertools.pairwise(widths))
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 1000)

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


NETWORKS: dict[str, type[nn.Module]] = {"resnet18": ResNet18, "vgg16": Vgg16}


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
