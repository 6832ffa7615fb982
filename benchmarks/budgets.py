"""What plans keep of trained networks.

    python benchmarks/budgets.py [--network example resnet20 vgg] [--seed 0 1] [--macs 0.5 0.25 0.15 0.1]
           [--keep 0.98] [--uniform 0.25] [--fast] [--no-refine] [--saved FOLDER] [--results FILE]

The rule ``balanced`` with whole-model budgets of MACs, and with a fidelity to keep, from the 1,024 unlabelled images of the
example, without labels. ``--uniform`` compares plans with every single structure at one ratio for all sites that gives the
same MACs of the whole model: by KL on the held-out calibration images, and on the test images. ``--network`` names networks of
``benchmarks/training.py``, or ``uneven``, whose layers differ much in sensitivity: the example with the last two residual
branches of its third stage weakened, so that nearly all harm is done before. ``--saved`` judges results that
``convrewrite optimize`` left as ``FOLDER/NETWORK-SEED-MACS`` instead of making them anew. Measured on all 10,000 test images of
Fashion-MNIST (Debian: dataset-fashion-mnist).
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from gathered import Gathered
from judging import Judge, judge_of, told, with_networks
from tabulate import tabulate
from torch import nn

import convrewrite
from convrewrite.rules import Match, Rule
from convrewrite.settings import Settings

STRUCTURES = ("separable", "asymmetric", "grouped", "channel", "tucker", "cp")

CLOSE = 0.005
"""Part of the whole model's MACs: a uniform ratio that comes so near the plan's MACs is near enough."""

REFINES = "refine" in {field.name for field in fields(Settings)}
"""Whether blocks can be refined once a plan is fitted; where they cannot, no row says that they were."""


def uneven(model: nn.Module) -> nn.Module:
    """The model, with its last two residual branches weakened beside their skip connections."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in ("stage3.1.bn2", "stage3.2.bn2") and isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(0.3)
    return model


@lru_cache(maxsize=1)
def named(network: str, seed: int) -> Judge:
    return Judge(uneven(judge_of("example", seed).model)) if network == "uneven" else judge_of(network, seed)


def planned(network: str, seed: int, **asked: Any) -> dict[str, Any]:
    """A row of a plan; ``asked`` are keywords of :func:`convrewrite.optimize`."""
    judge = named(network, seed)
    started = time.perf_counter()
    result = convrewrite.optimize(
        judge.model, judge.inputs[0], ["balanced"], judge.calibration("data"), measure=False, **asked
    )
    return _row(judge, result, time.perf_counter() - started)


def saved(network: str, seed: int, folder: Path) -> dict[str, Any]:
    """A row of a result that lies in a folder; its seconds are those of all stages in its report."""
    judge = named(network, seed)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    macs = report["totals"]["macs"]
    model = convrewrite.load(folder, judge.model).eval()
    seconds = round(sum(report["seconds"].values()), 1)
    return {"macs": round(macs["after"] / macs["before"], 6), **judge.found(model), "seconds": seconds}


def uniform(network: str, seed: int, structure: str, part: float, **asked: Any) -> dict[str, Any]:
    """A row of one structure at one ratio for all sites, which is searched for on the weights alone before the fit."""
    judge = named(network, seed)
    low, high, ratio = 0.0, 1.0, part
    rule = _rule(structure, ratio)
    for _ in range(12):
        rule = _rule(structure, ratio)
        found = convrewrite.optimize(judge.model, judge.inputs[0], [rule], "weights", measure=False, **asked)
        macs = found.report.totals.macs.ratio
        if abs(macs - part) < CLOSE:
            break
        low, high = (ratio, high) if macs < part else (low, ratio)
        ratio = (low + high) / 2
    started = time.perf_counter()
    calibration = judge.calibration("data")
    result = convrewrite.optimize(judge.model, judge.inputs[0], [rule], calibration, measure=False, **asked)
    return _row(judge, result, time.perf_counter() - started)


def _row(judge: Judge, result: convrewrite.Result, seconds: float) -> dict[str, Any]:
    macs = result.report.totals.macs.ratio
    return {"macs": round(macs, 6), **judge.found(result.model), "seconds": round(seconds, 1)}


def _rule(structure: str, ratio: float) -> Rule:
    return Rule(name=structure, match=Match(kernel_size=((3, 3),)), structures=(structure,), ratio=ratio)


def rows(gathered: Gathered, network: str, seed: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one network, each with what was asked."""
    refine: dict[str, Any] = {"refine": False} if REFINES and not arguments.refine else {}
    refines = REFINES and arguments.refine and not arguments.fast and arguments.saved is None
    common = {"network": network, "seed": seed, "fast": arguments.fast, "refine": refines}
    plan = partial(planned, network, seed, fast=arguments.fast, **refine)
    alike = partial(uniform, network, seed, **refine)
    work: dict[str, partial[dict[str, Any]]] = {}
    work |= {f"macs={part:g}": partial(plan, budget={"macs": part}) for part in arguments.macs}
    if arguments.saved is not None:
        folders = {part: arguments.saved / f"{network}-{seed}-{part:g}" for part in arguments.macs}
        work = {f"macs={part:g}": partial(saved, network, seed, folder) for part, folder in folders.items()}
    work |= {f"keep {share:g}": partial(plan, keep=share) for share in arguments.keep}
    for part in arguments.uniform:
        work |= {f"all sites {name}, macs={part:g}": partial(alike, name, part) for name in STRUCTURES}
    for name, measure in work.items():
        asked = common | {"asked": name}
        yield asked | gathered.row(asked, measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_networks(parser, "uneven")
    parser.add_argument("--macs", type=float, nargs="*", default=[0.5, 0.25, 0.15, 0.1])
    parser.add_argument("--keep", type=float, nargs="*", default=[0.98])
    parser.add_argument("--uniform", type=float, nargs="*", default=[0.25])
    parser.add_argument("--fast", action="store_true", help="measure less while planning")
    parser.add_argument("--no-refine", dest="refine", action="store_false", help="stop once every site is fitted")
    parser.add_argument("--saved", type=Path, help="judge the results in this folder; they were not refined")
    arguments = parser.parse_args()
    gathered = Gathered(arguments.results)
    found = [
        row
        for network in arguments.network
        for seed in arguments.seed
        for row in rows(gathered, network, seed, arguments)
    ]
    keys = "network seed asked macs top1 lost agreement kl held_out_kl held_out_agreement seconds"
    headers = ("network", "seed", "asked", "MACs", "top-1", "lost", "agreement", "KL", "held-out KL", "held-out", "s")
    print(tabulate([told(row, keys) for row in found], headers, disable_numparse=True))


if __name__ == "__main__":
    main()
