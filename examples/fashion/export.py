"""The trained network as an ONNX file, for ``convrewrite optimize FILE``: ``python examples/fashion/export.py fashion.onnx``."""

import argparse
from pathlib import Path

import torch
from model import fashion_resnet

import convrewrite

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="where the file goes")
    arguments = parser.parse_args()
    network = fashion_resnet()
    network.load_state_dict(torch.load(HERE / "fashion.pt", weights_only=True))
    convrewrite.export(network.eval(), torch.zeros(1, 1, 28, 28), arguments.path)
    print(f"{arguments.path}: {arguments.path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
