"""What plans keep on the trained example: ``python benchmarks/budgets.py [--macs 0.5 0.25 0.15] [--keep 0.98] [--uniform 0.25]``.

The rule ``balanced`` with whole-model budgets of MACs, and with a fidelity to keep, from the 1,024 unlabelled images of the
example, without labels. ``--uniform`` compares plans with every single structure at one ratio for all sites that gives the
same MACs of the whole model: by KL on the held-out calibration images, and on the test images. ``--network uneven`` takes
instead a network whose layers differ much in sensitivity: the example with the last two residual branches of its third stage
weakened, so that nearly all harm is done before. Measured on all 10,000 test images of Fashion-MNIST (Debian:
dataset-fashion-mnist).
"""

import argparse
import time
from collections.abc import Sequence

import torch
from fidelity import FASHION, SOURCES, fashion_resnet, load_split, logits
from tabulate import tabulate
from torch import Tensor, nn

import convrewrite
from convrewrite.calibration import Calibration, calibrate
from convrewrite.rules import Match, Rule
from convrewrite.runtime import measure_fidelity

STRUCTURES = ("separable", "asymmetric", "grouped", "channel", "tucker", "cp")
CLOSE = 0.005
"""Of the whole model's MACs: a uniform ratio that comes so near the plan's MACs will do."""


def uneven(model: nn.Module) -> nn.Module:
    """The last two residual branches count for little beside their skip connections."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in ("stage3.1.bn2", "stage3.2.bn2") and isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(0.3)
    return model


class Evaluator:
    """The original's scores on the test images, and what rewritten ones are told by."""

    def __init__(self, model: nn.Module, calibration: Calibration) -> None:
        self.images, self.labels = load_split("t10k")
        self.model, self.calibration = model, calibration
        self.scores = logits(model, self.images)
        self.right = self._right(self.scores)

    def _right(self, scores: Tensor) -> float:
        return float((scores.argmax(1) == self.labels).float().mean())

    def row(self, name: str, result: convrewrite.Result, seconds: float) -> tuple[str, ...]:
        found = logits(result.model, self.images)
        agreement = float((found.argmax(1) == self.scores.argmax(1)).float().mean())
        kl = float((self.scores.softmax(1) * (self.scores.log_softmax(1) - found.log_softmax(1))).sum(1).mean())
        held = measure_fidelity(self.model, result.model, self.calibration.held_out).outputs[0]
        top1, macs = self._right(found), result.report.totals.macs.ratio
        cells = (f"{macs:.3f}", f"{top1:.2%}", f"{100 * (self.right - top1):.2f}", f"{agreement:.2%}", f"{kl:.4f}")
        return (name, *cells, f"{held.kl:.4f}", f"{held.top1_agreement:.2%}", f"{seconds:.0f}")


def planned(evaluator: Evaluator, name: str, fast: bool, **asked: object) -> tuple[str, ...]:
    started = time.perf_counter()
    result = convrewrite.optimize(
        evaluator.model,
        evaluator.images[:1],
        ["balanced"],
        evaluator.calibration,
        fast=fast,
        measure=False,
        **asked,  # type: ignore[arg-type]
    )
    return evaluator.row(name, result, time.perf_counter() - started)


def uniform(evaluator: Evaluator, structure: str, part: float) -> tuple[str, ...]:
    """The ratio is searched for, on the weights alone, and then fitted."""
    low, high, ratio = 0.0, 1.0, part
    rule = _rule(structure, ratio)
    for _ in range(12):
        rule = _rule(structure, ratio)
        found = convrewrite.optimize(evaluator.model, evaluator.images[:1], [rule], "weights", measure=False)
        macs = found.report.totals.macs.ratio
        if abs(macs - part) < CLOSE:
            break
        low, high = (ratio, high) if macs < part else (low, ratio)
        ratio = (low + high) / 2
    started = time.perf_counter()
    result = convrewrite.optimize(evaluator.model, evaluator.images[:1], [rule], evaluator.calibration, measure=False)
    return evaluator.row(f"uniform {structure}", result, time.perf_counter() - started)


def _rule(structure: str, ratio: float) -> Rule:
    return Rule(name=structure, match=Match(kernel_size=((3, 3),)), structures=(structure,), ratio=ratio)


def table(evaluator: Evaluator, arguments: argparse.Namespace) -> Sequence[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []

    def tell(row: tuple[str, ...]) -> None:
        rows.append(row)
        print(" | ".join(row), flush=True)

    for part in arguments.macs:
        tell(planned(evaluator, f"macs={part:g}", arguments.fast, budget={"macs": part}))
    for share in arguments.keep:
        tell(planned(evaluator, f"keep {share:g}", arguments.fast, keep=share))
    for part in arguments.uniform:
        for structure in STRUCTURES:
            tell(uniform(evaluator, structure, part))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, nargs="*", default=[0.5, 0.25, 0.15])
    parser.add_argument("--keep", type=float, nargs="*", default=[0.98])
    parser.add_argument("--uniform", type=float, nargs="*", default=[0.25])
    parser.add_argument("--fast", action="store_true", help="measure less while planning")
    parser.add_argument("--network", choices=["example", "uneven"], default="example")
    arguments = parser.parse_args()
    model = fashion_resnet().eval()
    model.load_state_dict(torch.load(FASHION / "fashion.pt", weights_only=True))
    if arguments.network == "uneven":
        model = uneven(model)
    images, _ = load_split("t10k")
    evaluator = Evaluator(model, calibrate(model, (images[:1],), SOURCES["data"]))
    print(f"original: {evaluator.right:.2%} of {len(evaluator.labels):,} test images", flush=True)
    headers = ("asked", "MACs", "top-1", "lost", "agreement", "KL", "held-out KL", "held-out agreement", "seconds")
    print(tabulate(table(evaluator, arguments), headers, disable_numparse=True))


if __name__ == "__main__":
    main()
