"""What it costs that no option is taken which measures slower than what it replaces.

    python benchmarks/never_slower.py [--network example] [--seed 0] [--macs 0.5 0.25] [--results FILE]

Every budget twice, by default and with ``any_speed``: the result's time as a part of the original's in onnxruntime, at one
thread, and what it keeps of 10,000 test images. Nothing is refined, so that plans are compared and not trainings.
"""

import argparse
import time
from functools import partial
from typing import Any

from gathered import Gathered
from judging import judge_of, with_networks
from tabulate import tabulate

import convrewrite
from convrewrite.errors import PlanError


def row(network: str, seed: int, part: float, any_speed: bool) -> dict[str, Any]:
    judge, started = judge_of(network, seed), time.perf_counter()
    try:
        result = convrewrite.optimize(
            judge.model, judge.inputs[0], ["balanced"], judge.calibration("data"), {"macs": part}, refine=False,
            any_speed=any_speed,
        )  # fmt: skip
    except PlanError as error:
        return {"refused": str(error)}
    totals = result.report.totals
    assert totals.onnx_latency_seconds is not None
    return {
        "macs": round(totals.macs.ratio, 4),
        "time": round(totals.onnx_latency_seconds.ratio, 3),
        **judge.found(result.model),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_networks(parser)
    parser.add_argument("--macs", type=float, nargs="*", default=[0.5, 0.25])
    arguments = parser.parse_args()
    gathered, rows = Gathered(arguments.results), []
    for network in arguments.network:
        for seed in arguments.seed:
            for part in arguments.macs:
                for any_speed in (False, True):
                    asked = {"network": network, "seed": seed, "asked": f"macs={part:g}", "any_speed": any_speed}
                    found = gathered.row(asked, partial(row, network, seed, part, any_speed))
                    rows.append(asked | found)
    keys = ("network", "seed", "asked", "any_speed", "macs", "time", "lost", "kl", "seconds", "refused")
    print(tabulate([{key: found.get(key, "") for key in keys} for found in rows], headers="keys"))


if __name__ == "__main__":
    main()
