"""What each structure keeps on the trained example: top-1 lost, agreement with the original and KL on the test images.

    python benchmarks/fidelity.py [--calibration data|none|weights ...] [--rows separable asymmetric ...]
           [--output-weighting]

Every 3x3 convolution but the stem is rewritten at one uniform ratio of its own MACs, with the 1,024 unlabelled images of
the example ("data"), with inputs synthesised from BatchNorm statistics ("none"), or from the weights alone ("weights").
No labels, and no gradient through the network: the weighting of outputs is off (``--output-weighting`` turns it on).
Measured on all 10,000 test images of Fashion-MNIST (Debian: dataset-fashion-mnist).
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

FASHION = Path(__file__).parents[1] / "examples" / "fashion"
sys.path.insert(0, str(FASHION))

from data import load_split  # noqa: E402
from model import fashion_resnet  # noqa: E402

import convrewrite  # noqa: E402
from convrewrite.calibration import Calibration, calibrate  # noqa: E402
from convrewrite.rules import Match, Rule  # noqa: E402

SOURCES = {"data": str(FASHION / "calibration.npz"), "none": None, "weights": "weights"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    structure: str
    ratio: float
    parameters: dict[str, tuple[str | int, ...]] = field(default_factory=dict)

    def rule(self) -> Rule:
        return Rule(
            name=self.name,
            match=Match(kernel_size=((3, 3),)),
            structures=(self.structure,),
            ratio=self.ratio,
            parameters={self.structure: self.parameters} if self.parameters else {},
        )

    @property
    def name(self) -> str:
        return " ".join([self.structure, *(str(value) for values in self.parameters.values() for value in values)])


ROWS = (
    Row("separable", 0.40),
    Row("separable", 0.40, {"order": ("depthwise-first",)}),
    Row("separable", 0.40, {"order": ("pointwise-first",)}),
    Row("separable", 0.30),
    Row("asymmetric", 0.50),
    Row("asymmetric", 0.25),
    Row("grouped", 0.50, {"groups": (4,)}),
    Row("channel", 0.50),
    Row("tucker", 0.25),
    Row("cp", 0.25),
)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(500)])


def measure(
    row: Row,
    source: str,
    calibration: Calibration,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    original: Tensor,
    output_weighting: bool = False,
) -> tuple[str, ...]:
    result = convrewrite.optimize(
        model, images[:1], [row.rule()], calibration, output_weighting=output_weighting, measure=False
    )
    found = logits(result.model, images)
    rewritten = [site for site in result.report.sites if site.action == "rewritten"]
    ratio = sum(site.macs_after for site in rewritten) / max(1, sum(site.macs_before for site in rewritten))
    right = float((original.argmax(1) == labels).float().mean())
    top1 = float((found.argmax(1) == labels).float().mean())
    agreement = float((found.argmax(1) == original.argmax(1)).float().mean())
    kl = float((original.softmax(1) * (original.log_softmax(1) - found.log_softmax(1))).sum(1).mean())
    lost, seconds = f"{100 * (right - top1):.2f}", f"{sum(result.report.seconds.values()):.0f}"
    cells = (f"{row.ratio:.2f}", f"{ratio:.3f}", f"{top1:.2%}", lost, f"{agreement:.2%}", f"{kl:.4f}", seconds)
    return (row.name, source, str(len(rewritten)), *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", nargs="+", choices=list(SOURCES), default=["data"])
    parser.add_argument("--rows", nargs="+", default=None, help="structures; all of them by default")
    parser.add_argument("--output-weighting", action="store_true", help="weigh outputs by gradients of the original")
    parser.add_argument("--checkpoint", type=Path, default=FASHION / "fashion.pt", help="another state dict")
    arguments = parser.parse_args()
    images, labels = load_split("t10k")
    model = fashion_resnet().eval()
    model.load_state_dict(torch.load(arguments.checkpoint, weights_only=True))
    original = logits(model, images)
    right = float((original.argmax(1) == labels).float().mean())
    print(f"original: {right:.2%} of {len(labels):,} test images", flush=True)
    inputs = (images[:1],)
    calibrations = {name: calibrate(model, inputs, SOURCES[name]) for name in arguments.calibration}
    table = []
    for row in ROWS:
        for source, calibration in calibrations.items():
            if arguments.rows is None or row.structure in arguments.rows:
                weighting = arguments.output_weighting
                table.append(measure(row, source, calibration, model, images, labels, original, weighting))
                print(" ".join(table[-1]), file=sys.stderr, flush=True)
    headers = ("structure", "inputs", "sites", "asked", "ratio", "top-1", "lost", "agreement", "KL", "seconds")
    print(tabulate(table, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
