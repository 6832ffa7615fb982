"""Inputs that make sense to the networks of the ONNX corpus, made here: written lines and pages, garments, and sounds.

Trained networks answer noise with noise: what a rewriting keeps or loses shows only on inputs like those they learned. All
are float32 tensors drawn from a seed; where a network takes anything, noise is the last resort.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

Inputs = Mapping[str, Tensor]
"""Inputs of a network by their names, the first axis that of examples."""

Maker = Callable[[int, int], Inputs]
"""Makers of inputs, from the number of examples and a seed."""

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
"""Letters that text is written in; every recogniser of the corpus knows these."""

GARMENTS = Path(__file__).parents[1] / "examples" / "fashion" / "test.npz"
"""Garments are the 2,000 test images of Fashion-MNIST that the example ships."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's pixels, by which most networks of the corpus have theirs normalised."""

RATE = 16_000
"""Rate of the sounds in samples per second, that of the voice detectors."""


def one(name: str, make: Callable[[int, int], Tensor]) -> Maker:
    """The inputs of a network with this one input."""
    return lambda count, seed: {name: make(count, seed)}


def plain(images: Tensor) -> Tensor:
    """Pixels in [0, 1], as they are."""
    return images


def centred(images: Tensor) -> Tensor:
    """Pixels in [-1, 1]."""
    return (images - 0.5) / 0.5


def standardised(images: Tensor) -> Tensor:
    """Pixels normalised as for ImageNet."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def scaled(images: Tensor) -> Tensor:
    """Pixels in [0, 255]."""
    return images * 255


def lines(
    count: int, seed: int, *, height: int, width: int, channels: int = 3, norm: Callable[[Tensor], Tensor] = centred
) -> Tensor:
    """Images of one written line: ``(count, channels, height, width)``."""
    draw = np.random.default_rng(seed)
    return norm(torch.stack([_written(draw, height, width, rows=1, channels=channels) for _ in range(count)]))


def pages(
    count: int,
    seed: int,
    *,
    height: int,
    width: int,
    norm: Callable[[Tensor], Tensor] = standardised,
    channels: int = 3,
) -> Tensor:
    """Images of several written lines: ``(count, channels, height, width)``."""
    draw = np.random.default_rng(seed)
    rows = max(2, height // 40)
    return norm(torch.stack([_written(draw, height, width, rows=rows, channels=channels) for _ in range(count)]))


def garments(
    count: int,
    seed: int,
    *,
    height: int,
    width: int,
    channels: int = 3,
    norm: Callable[[Tensor], Tensor] = standardised,
) -> Tensor:
    """Grey garments, enlarged: ``(count, channels, height, width)``."""
    with np.load(GARMENTS) as held:
        chosen = np.random.default_rng(seed).choice(len(held["images"]), count)
        grey = torch.from_numpy(held["images"][chosen].astype(np.float32) / 255).reshape(count, 1, 28, 28)
    enlarged = F.interpolate(grey, (height, width), mode="bilinear", align_corners=False)
    return norm(enlarged.expand(count, channels, height, width).contiguous())


def noise(count: int, seed: int, *, shape: tuple[int, ...]) -> Tensor:
    """Normal noise, every example of this shape."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def sounds(count: int, seed: int, *, samples: int, rate: int = RATE) -> Tensor:
    """Notes with overtones that fade, and a little noise, in [-1, 1]: ``(count, samples)``."""
    draw = np.random.default_rng(seed)
    time = np.arange(samples) / rate
    made = []
    for _ in range(count):
        pitch, fading = draw.uniform(110, 440), draw.uniform(1, 6)
        overtones = sum(np.sin(2 * np.pi * pitch * k * time + draw.uniform(0, 6)) / k for k in range(1, 6))
        made.append(0.3 * overtones * np.exp(-fading * time) + draw.normal(0, 0.003, samples))
    return torch.from_numpy(np.clip(np.stack(made), -1, 1).astype(np.float32))


def photos(height: int, width: int, norm: Callable[[Tensor], Tensor] = standardised) -> Callable[[int, int], Tensor]:
    """Makes garments of this size."""
    return partial(garments, height=height, width=width, norm=norm)


def _written(draw: np.random.Generator, height: int, width: int, rows: int, channels: int) -> Tensor:
    """Dark letters on a light ground, or the other way round: ``(channels, height, width)`` in [0, 1]."""
    ground = int(draw.integers(180, 256))
    dark = int(draw.integers(0, 80))
    if draw.random() < 0.25:
        ground, dark = dark, ground
    image = Image.new("L", (width, height), ground)
    pen = ImageDraw.Draw(image)
    step = height / rows
    font = ImageFont.load_default(size=0.7 * step)
    for row in range(rows):
        text = "".join(draw.choice(list(LETTERS), int(draw.integers(3, 3 + max(2, int(width / step))))))
        pen.text((draw.uniform(0, width / 8), row * step), text, fill=dark, font=font)
    pixels = np.asarray(image, np.float32) / 255 + draw.normal(0, 0.01, (height, width)).astype(np.float32)
    return torch.from_numpy(pixels.clip(0, 1)).expand(channels, height, width).contiguous()
