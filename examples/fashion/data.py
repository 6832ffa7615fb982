"""Fashion-MNIST as tensors, and the two small files of it that the example ships.

``python examples/fashion/data.py`` writes calibration.npz (1,024 training images, no labels) and test.npz (the first
2,000 test images with labels) beside this file. The images are Zalando's Fashion-MNIST (Xiao et al. 2017), MIT licence.
"""

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def _read(name: str, header: int) -> np.ndarray:
    path = FOLDER / name
    if not path.exists():
        raise SystemExit(
            f"{path} is missing: install Debian's dataset-fashion-mnist, or set FASHION_MNIST to its folder"
        )
    with gzip.open(path) as stream:
        return np.frombuffer(stream.read(), np.uint8, offset=header)


def load_split(split: str) -> tuple[Tensor, Tensor]:
    """``split`` is "train" (60,000) or "t10k" (10,000): images ``(N, 1, 28, 28)`` in [0, 1], labels ``(N,)``."""
    pixels = _read(f"{split}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
    labels = _read(f"{split}-labels-idx1-ubyte.gz", header=8)
    return torch.from_numpy(pixels.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))


def main() -> None:
    images, _ = load_split("train")
    chosen = np.random.default_rng(0).choice(len(images), 1024, replace=False)
    np.savez_compressed(HERE / "calibration.npz", images=(images.numpy()[chosen] * 255).round().astype(np.uint8))
    images, labels = load_split("t10k")
    pixels = (images.numpy()[:2000] * 255).round().astype(np.uint8)
    np.savez_compressed(HERE / "test.npz", images=pixels, labels=labels.numpy()[:2000])


if __name__ == "__main__":
    main()
