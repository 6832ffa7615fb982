"""Drawn images with the boxes of what is on them: discs, squares and triangles before stripes and noise."""

import torch
from model import CLASSES, SIZE
from torch import Tensor

MOST = 3
"""Shapes on an image at most."""


def draw(count: int, seed: int, size: int = SIZE) -> tuple[Tensor, list[Tensor]]:
    """Images ``(N, 3, size, size)``, and of each one ``(shapes, 5)``: class, left, top, right and bottom in pixels."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size, dtype=torch.float), torch.arange(size, dtype=torch.float), indexing="ij")
    images, boxes = [], []
    for _ in range(count):
        image = _background(x, y, generator)
        found: list[Tensor] = []
        for _ in range(int(torch.randint(1, MOST + 1, (), generator=generator))):
            kind = int(torch.randint(len(CLASSES), (), generator=generator))
            radius = 6 + 18 * float(torch.rand((), generator=generator)) ** 2
            left, top = (radius + (size - 2 * radius) * torch.rand(2, generator=generator)).tolist()
            box = torch.tensor([kind, left - radius, top - radius, left + radius, top + radius])
            if any(_overlap(box, other) > 0.1 for other in found):
                continue
            inside = _inside(kind, (x - left) / radius, (y - top) / radius)
            image[:, inside] = 0.2 * image[:, inside] + 0.8 * torch.rand(3, 1, generator=generator)
            found.append(box)
        images.append(image)
        boxes.append(torch.stack(found))
    return torch.stack(images), boxes


def calibration() -> Tensor:
    """256 images that nothing was trained on, as ``--calib examples/detection/shapes.py:calibration`` takes them."""
    return draw(256, seed=2)[0]


def _background(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    angle, pitch = torch.rand(2, generator=generator).tolist()
    stripes = torch.sin((x * angle + y * (1 - angle)) / (3 + 12 * pitch))
    colour = torch.rand(3, 1, 1, generator=generator)
    return colour + 0.15 * stripes + 0.1 * torch.randn(3, *x.shape, generator=generator)


def _inside(kind: int, dx: Tensor, dy: Tensor) -> Tensor:
    if kind == 0:
        return dx.square() + dy.square() <= 1
    if kind == 1:
        return torch.maximum(dx.abs(), dy.abs()) <= 1
    return (dy.abs() <= 1) & (2 * dx.abs() <= dy + 1)


def _overlap(a: Tensor, b: Tensor) -> float:
    """The part of the smaller box that both cover."""
    sides = torch.minimum(a[3:], b[3:]) - torch.maximum(a[1:3], b[1:3])
    areas = [(box[3:] - box[1:3]).prod() for box in (a, b)]
    return float(sides.clamp(min=0).prod() / torch.minimum(*areas))
