"""Train a small super-resolution network for some seconds, rewrite it, and see how many decibels that costs.

``python examples/super_resolution/run.py [FOLDER]`` writes the result to FOLDER, if one is given. The images are those of
Fashion-MNIST that stand in ``examples/fashion``, 28x28; their halves, 14x14, are the inputs.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from model import SuperResolution, super_resolution
from torch import Tensor, nn
from torch.nn import functional as F

import convrewrite

IMAGES = Path(__file__).parent.parent / "fashion" / "calibration.npz"
STEPS, BATCH = 250, 16


def images() -> tuple[Tensor, Tensor]:
    """Small images ``(1024, 1, 14, 14)`` and what they were made from, ``(1024, 1, 28, 28)``, both in [0, 1]."""
    with np.load(IMAGES) as arrays:
        large = torch.from_numpy(arrays["images"]).reshape(-1, 1, 28, 28).float() / 255
    return F.avg_pool2d(large, 2), large


def train(model: nn.Module, small: Tensor, large: Tensor) -> None:
    """The mean absolute difference, with Adam and a learning rate that falls to zero."""
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    model.train()
    for step in range(STEPS):
        rows = torch.randint(len(small), (BATCH,), generator=torch.Generator().manual_seed(step))
        loss = (model(small[rows]) - large[rows]).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, for pixels in [0, 1]."""
    return float(-10 * (found.clamp(0, 1) - wanted).square().mean().log10())


def trained() -> SuperResolution:
    """The network, trained on the first 768 images in some seconds."""
    torch.manual_seed(0)
    model = super_resolution()
    small, large = images()
    train(model, small[:768], large[:768])
    return model


def main(folder: Path | None) -> dict[str, float]:
    """Train, rewrite and measure; returns every number that is printed."""
    model = trained()
    small, large = images()
    result = convrewrite.optimize(model, small[:1], rules=["balanced"], calibration=small[:256], fast=True)
    if folder is not None:
        result.save(folder)
    unseen, wanted = small[768:], large[768:]
    bilinear = F.interpolate(unseen, scale_factor=2.0, mode="bilinear", align_corners=False)
    (fidelity,), (parity,) = result.report.fidelity, result.report.parity
    with torch.no_grad():
        before, after = model(unseen), result.model(unseen)
    return {
        "macs": result.report.totals.macs.ratio,
        "psnr_bilinear": psnr(bilinear, wanted),
        "psnr_before": psnr(before, wanted),
        "psnr_after": psnr(after, wanted),
        f"{fidelity.name}:error": fidelity.relative_error,
        f"{parity.name}:onnx": parity.relative_error,
    }


if __name__ == "__main__":
    for name, value in main(Path(sys.argv[1]) if len(sys.argv) > 1 else None).items():
        print(f"{name:24} {value:.4g}")
