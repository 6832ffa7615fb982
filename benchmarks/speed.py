"""What a plan's MACs promise, and what is measured: in which runtime, at one thread.

    python benchmarks/speed.py [--networks resnet18 vgg16] [--runtimes onnxruntime openvino] [--macs 0.5] [--inputs 64]
           [--results FILE]

Networks of the named shape with random weights at 224 x 224 are rewritten on smoothed noise by the rule ``balanced``, with
``--fast``: what is planned is wanted here, not what it keeps. ``kept`` is the speed-up as a part of the MACs' promise, 1 where a
network of half the MACs takes half the time. ``predicted`` adds up the times of the chosen options and of all that stays.
Originals and results are timed in turns.
"""

import argparse
import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

from gathered import Gathered
from judging import told
from networks import NETWORKS, network_and_inputs
from tabulate import tabulate

import convrewrite

SIZE = 224


def row(network: str, runtime: str, part: float, inputs: int) -> dict[str, Any]:
    model, images = network_and_inputs(network, inputs, SIZE)
    started = time.perf_counter()
    result = convrewrite.optimize(
        model, images[:1], ["balanced"], images, {"macs": part}, fast=True, runtime=runtime, resume=False
    )
    totals = result.report.totals
    latency, predicted = totals.onnx_latency_seconds, totals.predicted_onnx_latency_seconds
    assert latency is not None
    assert predicted is not None
    return {
        "macs": round(totals.macs.ratio, 3),
        "time": round(latency.ratio, 3),
        "predicted": round(predicted / latency.before, 3),
        "kept": round(totals.macs.ratio / latency.ratio, 3),
        "original_ms": round(1e3 * latency.before, 2),
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.5])
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    gathered, rows = Gathered(arguments.results), []
    for network, runtime, part in itertools.product(arguments.networks, arguments.runtimes, arguments.macs):
        asked = {"network": network, "runtime": runtime, "asked": part, "inputs": arguments.inputs}
        rows.append(asked | gathered.row(asked, partial(row, network, runtime, part, arguments.inputs)))
    keys = "network runtime macs time predicted kept seconds"
    print(tabulate([told(found, keys) for found in rows], keys.split(), disable_numparse=True))


if __name__ == "__main__":
    main()
