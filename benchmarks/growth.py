"""How the tool's time grows with sites and with inputs: ``python benchmarks/growth.py [--results FILE] [--plot FILE]``.

Residual networks of 18, 34, 50 and 101 layers with random weights at 224 x 224, from 64 inputs, and the one of 18 layers from
more; each is fitted by the rule ``separable``, and planned by ``balanced`` for half its MACs, fast (``--cases``). Every run is a
process of one thread with a cache of its own; what counts is the time of its processor, which does not depend on what else runs.
``--plot`` draws what the file of results holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from gathered import RESULTS, Gathered
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101")
FEW = 64
INPUTS = (64, 128, 256, 512)
CASES = {"fit": "fitted: separable", "plan": "planned: balanced, fast"}
"""What is done, and what a plot calls it."""


def work(case: str, network: str, inputs: int) -> dict[str, Any]:
    """Seconds of the processor in this process, and how many sites there were."""
    from networks import network_and_inputs

    import convrewrite

    model, images = network_and_inputs(network, inputs, 224)
    started = time.process_time()
    if case == "plan":
        convrewrite.plan(model, images[:1], ["balanced"], images, {"macs": 0.5}, fast=True)
    else:
        convrewrite.optimize(model, images[:1], ["separable"], images, measure=False)
    seconds = time.process_time() - started
    return {"seconds": round(seconds, 1), "sites": len(convrewrite.analyze(model, images[:1]))}


def in_a_process(case: str, network: str, inputs: int) -> dict[str, Any]:
    """The same in a process of one thread."""
    with tempfile.TemporaryDirectory() as cache:
        told = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, __file__, "--child", case, network, str(inputs)]
        process = subprocess.run(words, env=os.environ | told, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{case} {network}: ended with {process.returncode}: {process.stderr[-2000:]}")
    return dict(json.loads(process.stdout.splitlines()[-1]))


def asked(cases: list[str]) -> list[tuple[str, str, int]]:
    """Every network from few inputs, and the smallest from more."""
    runs = [(network, FEW) for network in NETWORKS] + [(NETWORKS[0], inputs) for inputs in INPUTS if inputs > FEW]
    return [(case, network, inputs) for case in cases for network, inputs in runs]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds against sites, and against inputs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("sites", "inputs"), (f"sites, from {FEW} inputs", "inputs"), strict=True
    ):
        for case, name in CASES.items():
            own = [row for row in rows if row["case"] == case]
            own = [row for row in own if (row["inputs"] == FEW if key == "sites" else row["network"] == NETWORKS[0])]
            own.sort(key=lambda row: row[key])
            if len(own) < 2:
                continue
            axes.plot([row[key] for row in own], [row["seconds"] for row in own], "o-", label=name)
            for row in own if key == "sites" else ():
                axes.annotate(
                    row["network"], (row[key], row["seconds"]), (4, -10), textcoords="offset points", fontsize=8
                )
        axes.set(xlabel=label, ylabel="seconds of one processor")
        axes.set(xlim=(0, 1.15 * axes.get_xlim()[1]), ylim=(0, 1.25 * axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, network, inputs = arguments.child
        print(json.dumps(work(case, network, int(inputs))))
        return
    gathered, rows = Gathered(arguments.results), []
    for case, network, inputs in asked(arguments.cases):
        key = {"case": case, "network": network, "inputs": inputs}
        rows.append(key | gathered.row(key, partial(in_a_process, case, network, inputs)))
    print(tabulate([row.values() for row in rows], ["case", "network", "inputs", "seconds", "sites"]))
    if arguments.plot is not None:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
