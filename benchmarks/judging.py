"""What is left of a rewritten network on all 10,000 test images of Fashion-MNIST: what benchmarks of fidelity share."""

import argparse
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import FASHION, RECIPES, SEEDS, load, load_split

from convrewrite.calibration import Calibration, calibrate
from convrewrite.runtime import measure_fidelity

SOURCES = {"data": str(FASHION / "calibration.npz"), "none": None, "weights": "weights"}
"""Inputs that factors are fitted to: the example's images, inputs synthesised from BatchNorm statistics, none."""


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(500)])


class Judge:
    """An original's scores on the test images, which rewritten ones are held against."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.images, self.labels = load_split("t10k")
        self.scores = logits(model, self.images)
        self.right = self._right(self.scores)
        self._calibrations: dict[str, Calibration] = {}

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """One example, which the network is traced with."""
        return (self.images[:1],)

    def calibration(self, source: str) -> Calibration:
        """The inputs of this name of ``SOURCES``."""
        if source not in self._calibrations:
            self._calibrations[source] = calibrate(self.model, self.inputs, SOURCES[source])
        return self._calibrations[source]

    def found(self, rewritten: nn.Module) -> dict[str, float]:
        """Parts of the test images that are right, before and after, and that keep their class; KL in nats; points of top-1 lost;
        and KL and agreement on the calibration images that were held out."""
        scores = logits(rewritten, self.images)
        top1 = self._right(scores)
        agreement = float((scores.argmax(1) == self.scores.argmax(1)).double().mean())
        kl = (self.scores.softmax(1) * (self.scores.log_softmax(1) - scores.log_softmax(1))).sum(1).mean()
        held = measure_fidelity(self.model, rewritten, self.calibration("data").held_out).outputs[0]
        lost = round(100 * (self.right - top1), 6)
        return {
            "before": self.right, "top1": top1, "lost": lost, "agreement": round(agreement, 6), "kl": round(float(kl), 7),
            "held_out_kl": round(held.kl or 0, 7), "held_out_agreement": round(held.top1_agreement or 0, 6),
        }  # fmt: skip

    def _right(self, scores: Tensor) -> float:
        return round(float((scores.argmax(1) == self.labels).double().mean()), 6)


def with_networks(parser: argparse.ArgumentParser, *more: str) -> None:
    """The options that say which networks are measured, and where the rows are gathered."""
    parser.add_argument("--network", nargs="+", choices=[*RECIPES, *more], default=["example"])
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=[SEEDS[0]])
    parser.add_argument("--results", type=Path, help="gather the rows in this file, and measure none that it has")


@lru_cache(maxsize=1)
def judge_of(network: str, seed: int) -> Judge:
    return Judge(load(network, seed))


def told(row: dict[str, Any], keys: str) -> tuple[str, ...]:
    """Cells of a table: parts as percents, points and KL with their significant digits, the rest as they are."""
    return tuple(_cell(key, row[key]) for key in keys.split())


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key in ("top1", "agreement", "held_out_agreement", "before"):
        return f"{value:.2%}"
    digits = {"lost": 2, "kl": 4, "held_out_kl": 4, "macs": 3, "ratio": 3, "seconds": 0}
    return f"{value:.{digits[key]}f}" if key in digits else str(value)
