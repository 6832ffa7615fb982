"""Top-1 of a .pt, an .onnx or a result folder: ``python examples/fashion/evaluate.py MODEL ... [--all]``.

On the 2,000 test images beside this file, or with ``--all`` on the 10,000 of Fashion-MNIST.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from data import load_split
from model import fashion_resnet
from torch import Tensor

import convrewrite
from convrewrite.onnx_files import OnnxModel

HERE = Path(__file__).parent


def test_images(everything: bool) -> tuple[Tensor, Tensor]:
    if everything:
        return load_split("t10k")
    with np.load(HERE / "test.npz") as arrays:
        return torch.from_numpy(arrays["images"]).float() / 255, torch.from_numpy(arrays["labels"])


def load(path: Path) -> Callable[[Tensor], Tensor]:
    if path.is_dir() and not (path / "weights.safetensors").exists():  # the result of an ONNX model
        path = path / "model.onnx"
    if path.suffix == ".onnx":
        runtime = OnnxModel(path)
        return lambda x: runtime(x)["output"]
    original = fashion_resnet()
    if path.is_dir():
        return convrewrite.load(path, original).eval()
    original.load_state_dict(torch.load(path, weights_only=True))
    return original.eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--all", action="store_true", help="all 10,000 test images of the installed data set")
    arguments = parser.parse_args()
    images, labels = test_images(arguments.all)
    for path in arguments.models:
        print(f"{path}: {accuracy(load(path), images, labels):.2%} of {len(labels):,} test images")


if __name__ == "__main__":
    main()
