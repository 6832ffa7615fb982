"""What plans within a part of the time keep, and what a structure is worth there.

    python benchmarks/within_time.py [--network example] [--seed 0] [--latency 0.6 0.4] [--without input-channel] [--results FILE]

Every budget with the rule ``balanced``, and once more for each structure of ``--without`` with all the others: the result's
time as a part of the original's, measured in onnxruntime at one thread, and what it keeps of 10,000 test images. Nothing is
refined, so that plans are compared and not trainings.
"""

import argparse
import time
from functools import partial
from typing import Any

from gathered import Gathered
from judging import judge_of, told, with_networks
from tabulate import tabulate

import convrewrite
from convrewrite.rules import Rule, resolve


def others(name: str) -> list[Rule]:
    """The rules of ``balanced``, without a structure."""
    (rule,) = resolve(["balanced"])
    return [rule.model_copy(update={"structures": tuple(one for one in rule.structures if one != name)})]


def row(network: str, seed: int, part: float, without: str) -> dict[str, Any]:
    judge, started = judge_of(network, seed), time.perf_counter()
    result = convrewrite.optimize(
        judge.model, judge.inputs[0], others(without), judge.calibration("data"), {"latency": part}, refine=False
    )
    totals = result.report.totals
    assert totals.onnx_latency_seconds is not None
    return {
        "macs": round(totals.macs.ratio, 4),
        "ratio": round(totals.onnx_latency_seconds.ratio, 3),
        **judge.found(result.model.eval()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_networks(parser)
    parser.add_argument("--latency", type=float, nargs="*", default=[0.6, 0.4])
    parser.add_argument("--without", nargs="*", default=[])
    arguments = parser.parse_args()
    gathered, rows = Gathered(arguments.results), []
    for network in arguments.network:
        for seed in arguments.seed:
            for part in arguments.latency:
                for without in ("", *arguments.without):
                    asked = {"network": network, "seed": seed, "asked": f"latency={part:g}", "without": without}
                    rows.append(asked | gathered.row(asked, partial(row, network, seed, part, without)))
    keys = "network seed asked without ratio macs lost kl held_out_kl seconds"
    headers = ("network", "seed", "asked", "without", "time", "MACs", "lost", "KL", "held-out KL", "s")
    print(tabulate([told(found, keys) for found in rows], headers, disable_numparse=True))


if __name__ == "__main__":
    main()
