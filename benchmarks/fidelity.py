"""What each structure keeps of trained networks: top-1 lost, agreement with the original and KL on the test images.

    python benchmarks/fidelity.py [--network example resnet20 vgg] [--seed 0 1] [--calibration data|none|weights ...]
           [--rows separable asymmetric ...] [--output-weighting] [--results FILE]

Every 3x3 convolution but the stem is rewritten at one uniform ratio of its own MACs, with the 1,024 unlabelled images of
the example ("data"), with inputs synthesised from BatchNorm statistics ("none"), or from the weights alone ("weights").
No labels, and no gradient through the network: the weighting of outputs is off (``--output-weighting`` turns it on), and so
is the refinement of blocks. Measured on all 10,000 test images of Fashion-MNIST (Debian: dataset-fashion-mnist).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gathered import Gathered
from judging import SOURCES, Judge, judge_of, told, with_networks
from tabulate import tabulate
from training import fashion_resnet

import convrewrite
from convrewrite.rules import Match, Rule
from convrewrite.settings import Settings

UNREFINED: dict[str, Any] = {"refine": False} if "refine" in {field.name for field in fields(Settings)} else {}
"""What keeps blocks as they were fitted: refinement takes gradients through the network."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    structure: str
    ratio: float
    parameters: dict[str, tuple[int | float | str, ...]] = field(default_factory=dict)

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


def measure(row: Row, source: str, judge: Judge, output_weighting: bool) -> dict[str, Any]:
    result = convrewrite.optimize(
        judge.model, judge.inputs[0], [row.rule()], judge.calibration(source), output_weighting=output_weighting,
        measure=False, **UNREFINED,
    )  # fmt: skip
    rewritten = [site for site in result.report.sites if site.action == "rewritten"]
    ratio = sum(site.macs_after for site in rewritten) / max(1, sum(site.macs_before for site in rewritten))
    seconds = round(sum(result.report.seconds.values()), 1)
    return {"sites": len(rewritten), "ratio": round(ratio, 6), **judge.found(result.model), "seconds": seconds}


def rows(gathered: Gathered, judge: Judge, common: dict[str, Any], arguments: argparse.Namespace) -> Iterator[Any]:
    """The rows of one network, each with what was asked."""
    weighting = arguments.output_weighting
    for row in ROWS:
        for source in arguments.calibration:
            if arguments.rows is None or row.structure in arguments.rows:
                asked = common | {"structure": row.name, "inputs": source, "asked": row.ratio, "weighting": weighting}
                yield asked | gathered.row(asked, partial(measure, row, source, judge, weighting))


def judge_named(network: str, seed: int, checkpoint: Path | None) -> Judge:
    if checkpoint is None:
        return judge_of(network, seed)
    model = fashion_resnet().eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return Judge(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_networks(parser)
    parser.add_argument("--calibration", nargs="+", choices=list(SOURCES), default=["data"])
    parser.add_argument("--rows", nargs="+", default=None, help="structures; all of them by default")
    parser.add_argument("--output-weighting", action="store_true", help="weigh outputs by gradients of the original")
    parser.add_argument("--checkpoint", type=Path, help="a state dict of the example's shape instead of these networks")
    arguments = parser.parse_args()
    gathered = Gathered(arguments.results)
    found: list[dict[str, Any]] = []
    for network in [str(arguments.checkpoint)] if arguments.checkpoint else arguments.network:
        for seed in arguments.seed:
            judge = judge_named(network, seed, arguments.checkpoint)
            print(f"{network} {seed}: {judge.right:.2%} of {len(judge.labels):,} test images", flush=True)
            found += rows(gathered, judge, {"network": network, "seed": seed}, arguments)
    keys = "network seed structure inputs sites asked ratio top1 lost agreement kl seconds"
    headers = (
        "network",
        "seed",
        "structure",
        "inputs",
        "sites",
        "asked",
        "ratio",
        "top-1",
        "lost",
        "agreement",
        "KL",
        "s",
    )
    print(tabulate([told(row, keys) for row in found], headers, disable_numparse=True))


if __name__ == "__main__":
    main()
