"""A detector of the shape of YOLOv8 (Jocher et al. 2023): C2f blocks, SPPF, a path up and one down, three heads.

The network is a sequence whose layers say where their inputs come from, and boxes are distributions over distances (DFL,
Li et al. 2020: Generalized Focal Loss), so that what is special about such networks is here too. It is smaller than the
smallest of them, and written for this example.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

CLASSES = ("disc", "square", "triangle")
SIZE = 96
"""Pixels of an image's side that it was trained on; any multiple of 32 will do."""

STRIDES = (8, 16, 32)
BINS = 12
"""Distances that a side of a box is a distribution over, in strides."""

WIDTHS = (16, 24, 48, 64, 96)


class Conv(nn.Module):
    """A convolution, BatchNorm and SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3 x 3, with a skip where it is asked for."""

    def __init__(self, channels: int, skip: bool) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, 3)
        self.cv2 = Conv(channels, channels, 3)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.skip else y


class C2f(nn.Module):
    """Half of the channels goes through bottlenecks, and what each of them gives is joined at the end."""

    def __init__(self, inputs: int, outputs: int, count: int, skip: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1 = Conv(inputs, 2 * half)
        self.m = nn.ModuleList(Bottleneck(half, skip) for _ in range(count))
        self.cv2 = Conv((2 + count) * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling: one pooling three times over."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 5) -> None:
        super().__init__()
        self.cv1 = Conv(inputs, inputs // 2)
        self.cv2 = Conv(2 * inputs, outputs)
        self.m = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Concat(nn.Module):
    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(parts), 1)


class DFL(nn.Module):
    """The mean of a distribution over distances, as a 1 x 1 convolution with fixed weights 0, 1, 2 ..."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        batch, _, cells = x.shape
        return self.conv(x.view(batch, 4, self.bins, cells).transpose(2, 1).softmax(1)).view(batch, 4, cells)


class Detect(nn.Module):
    """Three heads. In training mode their raw maps ``(N, 4 * BINS + C, H, W)``; else ``(N, 4 + C, cells)``: centre, width and
    height of a box in pixels, and the score of every class."""

    def __init__(self, inputs: Sequence[int], classes: int) -> None:
        super().__init__()
        boxes, scores = 4 * BINS, max(inputs[0], classes)
        self.nc, self.shape = classes, None
        self.anchors, self.strides = torch.empty(0), torch.empty(0)
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(width, boxes, 3), Conv(boxes, boxes, 3), nn.Conv2d(boxes, boxes, 1)) for width in inputs
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(width, scores, 3), Conv(scores, scores, 3), nn.Conv2d(scores, classes, 1))
            for width in inputs
        )
        self.dfl = DFL(BINS)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor] | Tensor:
        found = [torch.cat((box(x), score(x)), 1) for box, score, x in zip(self.cv2, self.cv3, maps, strict=True)]
        return found if self.training else self.decoded(found)

    def decoded(self, maps: list[Tensor]) -> Tensor:
        shape = maps[0].shape
        if self.shape != shape:  # kept from one image of a size to the next
            self.anchors, self.strides = anchors_of([x.shape[2:] for x in maps])
            self.shape = shape
        flat = torch.cat([x.flatten(2) for x in maps], 2)
        boxes, scores = flat.split((4 * BINS, self.nc), 1)
        low, high = self.dfl(boxes).chunk(2, 1)
        first, last = self.anchors - low, self.anchors + high
        return torch.cat((torch.cat(((first + last) / 2, last - first), 1) * self.strides, scores.sigmoid()), 1)


def anchors_of(sizes: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The centres ``(2, cells)`` of all cells, in strides, and the stride ``(1, cells)`` of each."""
    centres, strides = [], []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centres.append(torch.stack((x.flatten(), y.flatten())))
        strides.append(torch.full((1, height * width), float(stride)))
    return torch.cat(centres, 1), torch.cat(strides, 1)


class Detector(nn.Module):
    """``(N, 3, H, W)`` with sides that are multiples of 32. Every layer says by ``f`` which outputs it takes."""

    def __init__(self, classes: int = len(CLASSES), widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        first, *others = widths
        p3, p4, p5 = widths[2:]
        layers: list[tuple[int | list[int], nn.Module]] = [(-1, Conv(3, first, 3, 2))]
        for (a, b), count in zip(pairwise((first, *others)), (1, 2, 2, 1), strict=True):
            layers += [(-1, Conv(a, b, 3, 2)), (-1, C2f(b, b, count, skip=True))]
        layers += [(-1, SPPF(p5, p5))]  # 9; what p3 and p4 are taken from is 4 and 6
        layers += [(-1, nn.Upsample(scale_factor=2)), ([-1, 6], Concat()), (-1, C2f(p5 + p4, p4, 1, skip=False))]
        layers += [(-1, nn.Upsample(scale_factor=2)), ([-1, 4], Concat()), (-1, C2f(p4 + p3, p3, 1, skip=False))]
        layers += [(-1, Conv(p3, p3, 3, 2)), ([-1, 12], Concat()), (-1, C2f(p3 + p4, p4, 1, skip=False))]
        layers += [(-1, Conv(p4, p4, 3, 2)), ([-1, 9], Concat()), (-1, C2f(p4 + p5, p5, 1, skip=False))]
        layers += [([15, 18, 21], Detect((p3, p4, p5), classes))]
        for index, (source, layer) in enumerate(layers):
            layer.i, layer.f = index, source
        self.model = nn.Sequential(*(layer for _, layer in layers))
        self.save = {index for source, _ in layers if isinstance(source, list) for index in source if index != -1}
        self.names = dict(enumerate(CLASSES))

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        kept: dict[int, Tensor] = {}
        for layer in self.model:
            x = layer(x if layer.f == -1 else [x if index == -1 else kept[index] for index in layer.f])
            if layer.i in self.save:
                kept[layer.i] = x
        return x


def detector() -> Detector:
    """The untrained network, for a state dict."""
    return Detector()
