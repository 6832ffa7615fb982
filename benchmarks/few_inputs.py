"""What 32 to 256 inputs are worth on the trained example.

    python benchmarks/few_inputs.py [--inputs 32 64 128 256] [--macs 0.25] [--fast] [--all]

The example is rewritten within a budget of MACs by the rule ``balanced`` from the first so many of its unlabelled calibration
images, and judged on the 2,000 test images beside it (``--all``: on the 10,000 of Debian's dataset-fashion-mnist): top-1 lost,
agreement with the original, KL. With fewer inputs more should be lost, and nowhere much more at once. Writes
``benchmarks/results/few_inputs.json``.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn

FASHION = Path(__file__).parents[1] / "examples" / "fashion"
RESULTS = Path(__file__).parent / "results" / "few_inputs.json"
sys.path.insert(0, str(FASHION))

from data import load_split  # noqa: E402
from model import fashion_resnet  # noqa: E402

import convrewrite  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One run: how it was asked, and what is left of the network on the test images."""

    inputs: int
    macs: float
    fast: bool
    seed: int
    images: int
    top1: float
    lost: float
    agreement: float
    kl: float
    macs_left: float
    seconds: float
    warnings: tuple[str, ...]


def test_images(everything: bool) -> tuple[Tensor, Tensor]:
    if everything:
        return load_split("t10k")
    with np.load(FASHION / "test.npz") as arrays:
        return torch.from_numpy(arrays["images"]).float() / 255, torch.from_numpy(arrays["labels"])


def calibration_images() -> Tensor:
    with np.load(FASHION / "calibration.npz") as arrays:
        return torch.from_numpy(arrays[arrays.files[0]]).float() / 255


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(500)])


class Judge:
    """The original's scores on the test images, which rewritten ones are held against."""

    def __init__(self, model: nn.Module, everything: bool) -> None:
        self.model = model
        self.images, self.labels = test_images(everything)
        self.scores = logits(model, self.images)
        self.right = float((self.scores.argmax(1) == self.labels).float().mean())

    def row(self, seen: Tensor, macs: float, fast: bool, seed: int) -> Row:
        started = time.perf_counter()
        result = convrewrite.optimize(
            self.model, self.images[:1], ["balanced"], seen, {"macs": macs}, seed, fast=fast, measure=False
        )
        seconds = time.perf_counter() - started
        found = logits(result.model, self.images)
        top1 = float((found.argmax(1) == self.labels).float().mean())
        agreement = float((found.argmax(1) == self.scores.argmax(1)).float().mean())
        kl = float((self.scores.softmax(1) * (self.scores.log_softmax(1) - found.log_softmax(1))).sum(1).mean())
        left, told = result.report.totals.macs.ratio, result.report.warnings
        images = len(self.images)
        return Row(
            len(seen), macs, fast, seed, images, top1, self.right - top1, agreement, kl, left, seconds, told
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--macs", type=float, default=0.25)
    parser.add_argument("--fast", action="store_true", help="measure less while planning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="all 10,000 test images of the installed data set")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = fashion_resnet().eval()
    model.load_state_dict(torch.load(FASHION / "fashion.pt", weights_only=True))
    judge, images = Judge(model, arguments.all), calibration_images()
    print(f"original: {judge.right:.2%} of {len(judge.images):,} test images", flush=True)
    rows = []
    for count in arguments.inputs:
        rows.append(judge.row(images[:count], arguments.macs, arguments.fast, arguments.seed))
        print(rows[-1], flush=True)
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    headers = ("inputs", "MACs", "top-1", "lost", "agreement", "KL", "seconds")
    cells = [
        (r.inputs, f"{r.macs_left:.3f}", f"{r.top1:.2%}", f"{100 * r.lost:.2f}", f"{r.agreement:.2%}", f"{r.kl:.4f}",
         f"{r.seconds:.0f}")
        for r in rows
    ]  # fmt: skip
    print(tabulate(cells, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
