"""Train a small U-Net on drawn shapes for some seconds, rewrite it, and see what each of its two outputs lost.

``python examples/segmentation/run.py [FOLDER]`` writes the result to FOLDER, if one is given. Nothing is downloaded: the
images are discs, squares and triangles on noise.
"""

import sys
from pathlib import Path

import torch
from model import CLASSES, UNet, unet
from torch import Tensor, nn

import convrewrite

SIZE = 32
STEPS, BATCH = 200, 16


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 32, 32)`` and the class of each pixel ``(N, 32, 32)``: one to three shapes, later ones in front."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images = 0.15 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    classes = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    for index in range(count):
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            kind = int(torch.randint(1, len(CLASSES), (), generator=generator))
            radius = int(torch.randint(4, 9, (), generator=generator))
            top, left = torch.randint(6, SIZE - 6, (2,), generator=generator).tolist()
            dy, dx = y - top, x - left
            inside = {
                1: dy.square() + dx.square() <= radius**2,
                2: torch.maximum(dy.abs(), dx.abs()) <= 0.85 * radius,
                3: (dy.abs() <= radius) & (2 * dx.abs() <= dy + radius),
            }[kind]
            images[index, 0, inside] += 0.4 + 0.6 * float(torch.rand((), generator=generator))
            classes[index, inside] = kind
    return images, classes


def largest(classes: Tensor) -> Tensor:
    """The shape that covers most pixels, counted from 0."""
    return torch.stack([(classes == kind).sum((1, 2)) for kind in range(1, len(CLASSES))], 1).argmax(1)


def train(model: nn.Module, images: Tensor, classes: Tensor) -> None:
    """Cross-entropy of both outputs, with Adam and a learning rate that falls to zero."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.012)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    wanted, loss_of = largest(classes), nn.CrossEntropyLoss()
    model.train()
    for step in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=torch.Generator().manual_seed(step))
        outputs = model(images[rows])
        loss = loss_of(outputs["mask"], classes[rows]) + 0.2 * loss_of(outputs["largest"], wanted[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, classes: Tensor) -> dict[str, float]:
    """The part of the pixels that is right, and the mean intersection over union of the three shapes."""
    found = model(images)["mask"].argmax(1)
    unions = [
        ((found == kind) & (classes == kind)).sum() / ((found == kind) | (classes == kind)).sum() for kind in (1, 2, 3)
    ]
    return {"pixels": float((found == classes).float().mean()), "iou": float(torch.stack(unions).mean())}


def trained() -> UNet:
    """The network, trained on 512 images in some seconds."""
    torch.manual_seed(0)
    model = unet()
    train(model, *draw(512, seed=1))
    return model


def main(folder: Path | None) -> dict[str, float]:
    """Train, rewrite and measure; returns every number that is printed."""
    model = trained()
    calibration, _ = draw(128, seed=2)
    result = convrewrite.optimize(model, calibration[:1], rules=["balanced"], calibration=calibration, fast=True)
    if folder is not None:
        result.save(folder)
    images, classes = draw(128, seed=3)
    before, after = scores(model, images, classes), scores(result.model, images, classes)
    found = {"macs": result.report.totals.macs.ratio}
    found |= {f"{name}_before": value for name, value in before.items()}
    found |= {f"{name}_after": value for name, value in after.items()}
    for row in result.report.fidelity:
        found[f"{row.name}:error"] = row.relative_error
        if row.top1_agreement is not None:
            found[f"{row.name}:agreement"] = row.top1_agreement
    for parity in result.report.parity:
        found[f"{parity.name}:onnx"] = parity.relative_error
    return found


if __name__ == "__main__":
    for name, value in main(Path(sys.argv[1]) if len(sys.argv) > 1 else None).items():
        print(f"{name:24} {value:.4g}")
