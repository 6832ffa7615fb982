"""Planning as a whole: ``python benchmarks/plan.py resnet18 --budget latency=0.5 [--fast] [--inputs 256] [--apply]``.

A network of the named shape with random weights is planned with the rule ``balanced`` at 224 x 224 on smoothed noise.
Prints the seconds of planning and of its stages, and what the plan promises; with ``--apply`` the plan is fitted and the
latency of the whole model measured as well: asked, predicted, measured, and the speed-up against that of the MACs.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from gathered import Gathered
from networks import NETWORKS, network_and_inputs
from torch import Tensor, nn

import convrewrite
from convrewrite.values import budget


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of planning, what was chosen and promised; with ``--apply`` what came of it."""
    model, images = network_and_inputs(arguments.network, arguments.inputs, arguments.size)
    started = time.perf_counter()
    plan = convrewrite.plan(model, images[:1], ["balanced"], images, budget(arguments.budget), fast=arguments.fast)
    seconds = time.perf_counter() - started
    rewritten = {site.name: site.option.option().describe() for site in plan.sites if site.option is not None}
    found = {
        "seconds": round(seconds, 1),
        "sites": len(plan.sites),
        "rewritten": rewritten,
        "promised": str(plan.predicted),
    }
    return found | (carried_out(model, images, plan) if arguments.apply else {})


def carried_out(model: nn.Module, images: Tensor, plan: convrewrite.Plan) -> dict[str, Any]:
    result = convrewrite.apply(model, images[:1], plan, images)
    latency, macs = result.report.totals.onnx_latency_seconds, result.report.totals.macs
    predicted = result.report.totals.predicted_onnx_latency_seconds
    assert latency is not None and predicted is not None
    return {
        "latency": latency.ratio, "predicted": predicted / latency.before, "macs": macs.after / macs.before,
        "refused": result.refused,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--apply", action="store_true")
    parser.add_argument("--results", type=Path, help="gather the rows in this file, and measure none that it has")
    arguments = parser.parse_args()
    asked = {key: getattr(arguments, key) for key in ("network", "budget", "inputs", "size", "fast", "apply")}
    found = Gathered(arguments.results).row(asked, partial(measure, arguments))
    print(
        f"{arguments.network}, {arguments.inputs} inputs{', fast' if arguments.fast else ''}, asked {arguments.budget}"
    )
    print(f"planned in {found['seconds']:.0f} s: {len(found['rewritten'])} of {found['sites']} sites")
    print(
        f"promised {found['promised']}",
        *(f"{name}: {option}" for name, option in found["rewritten"].items()),
        sep="\n  ",
    )
    if "latency" in found:
        print(f"latency: measured {found['latency']:.3f} of the original's, predicted {found['predicted']:.3f}")
        print(
            f"macs: {found['macs']:.3f}; speed-up {1 / found['latency']:.2f}, the MACs promise {1 / found['macs']:.2f}"
        )
        print(f"refused: {found['refused']}")


if __name__ == "__main__":
    main()
