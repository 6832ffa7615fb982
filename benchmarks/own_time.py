"""The tool's own time: whole processes, this checkout against an earlier one.

    python benchmarks/own_time.py [--cases start demo separable plan latency whole] [--networks resnet18] [--inputs 256]
           [--before CHECKOUT] [--results FILE]

``start``: importing the package, ``--version`` and ``--help``, the best of five. ``demo``: the main job of ``make demo``.
``separable``: a network of the named shape with random weights at 224 x 224, rewritten by the rule ``separable``, up to the
verified ONNX file. ``plan``: the same planned with ``balanced`` for half the MACs, and then for two fifths, for which what is
known is used. ``latency`` and ``whole``: optimised with ``balanced`` within half the time, or within six tenths of the MACs, up
to the verified file. Every run has a cache of its own, and nothing else should run beside it. ``--before`` names a checkout of
another commit, which is measured beside this one, turn by turn.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from demo import OPTIMIZE
from gathered import Gathered
from tabulate import tabulate

ROOT = Path(__file__).parents[1]

STARTS = {
    "import": ("-c", "import convrewrite"),
    "--version": ("-m", "convrewrite", "--version"),
    "--help": ("-m", "convrewrite", "--help"),
}

TIMES = 5


def separable(network: str, inputs: int) -> dict[str, Any]:
    """Seconds of one process, in all and by stages."""
    from networks import network_and_inputs

    import convrewrite

    model, images = network_and_inputs(network, inputs, 224)
    started = time.perf_counter()
    result = convrewrite.optimize(model, images[:1], ["separable"], images)
    return {"seconds": time.perf_counter() - started, "stages": result.report.seconds}


def whole(budget: dict[str, float], network: str, inputs: int) -> dict[str, Any]:
    """Seconds of one process, in all and by stages."""
    from networks import network_and_inputs

    import convrewrite

    model, images = network_and_inputs(network, inputs, 224)
    started = time.perf_counter()
    result = convrewrite.optimize(model, images[:1], ["balanced"], images, budget)
    return {"seconds": time.perf_counter() - started, "stages": result.report.seconds}


def plan(network: str, inputs: int) -> dict[str, Any]:
    """Seconds in one process: of a first budget, and of another one on the same model."""
    from networks import network_and_inputs

    import convrewrite

    model, images = network_and_inputs(network, inputs, 224)
    seconds = []
    for part in (0.5, 0.4):
        started = time.perf_counter()
        convrewrite.plan(model, images[:1], ["balanced"], images, {"macs": part})
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[0], "second budget": seconds[1]}


def as_the_command_does() -> None:
    """What the command line asks of the machine before it begins, as far as this checkout knows it."""
    from convrewrite import machine

    for name in ("share_processor", "keep_heap"):
        getattr(machine, name, lambda: None)()


CHILDREN: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "separable": separable,
    "plan": plan,
    "latency": partial(whole, {"latency": 0.5}),
    "whole": partial(whole, {"macs": 0.6}),
}


def ran(checkout: Path, words: tuple[str, ...]) -> tuple[float, str]:
    """Seconds of a process that imports a checkout's package, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        places = {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        started = time.perf_counter()
        process = subprocess.run(
            [sys.executable, *words], cwd=folder, env=os.environ | places, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{words}: ended with {process.returncode}: {process.stderr[-2000:]}")
    return seconds, process.stdout


def start(checkout: Path, words: tuple[str, ...]) -> dict[str, Any]:
    return {"seconds": round(min(ran(checkout, words)[0] for _ in range(TIMES)), 3)}


def child(checkout: Path, case: str, network: str, inputs: int) -> dict[str, Any]:
    seconds, printed = ran(checkout, (__file__, "--child", case, "--networks", network, "--inputs", str(inputs)))
    return {"process": round(seconds, 1), **json.loads(printed.splitlines()[-1])}


def measured(gathered: Gathered, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    checkouts = {"now": ROOT} | ({} if arguments.before is None else {"before": arguments.before})
    rows: list[dict[str, Any]] = []

    def row(work: Any, **asked: Any) -> None:
        for which, checkout in checkouts.items():
            key = {**asked, "which": which}
            rows.append(key | gathered.row(key, partial(work, checkout)))

    for case in arguments.cases:
        if case == "start":
            for name, words in STARTS.items():
                row(lambda checkout, words=words: start(checkout, words), case=name)
        elif case == "demo":
            row(lambda checkout: {"seconds": round(ran(checkout, OPTIMIZE)[0], 1)}, case=case)
        else:
            for network in arguments.networks:
                for inputs in arguments.inputs:
                    asked = {"case": case, "network": network, "inputs": inputs}
                    row(lambda checkout, a=asked: child(checkout, *a.values()), **asked)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["start", "demo", "separable", "plan"])
    parser.add_argument("--networks", nargs="+", default=["resnet18"])
    parser.add_argument("--inputs", type=int, nargs="+", default=[256])
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--results", type=Path, help="gather the rows in this file, and measure none that it has")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        as_the_command_does()
        found = CHILDREN[arguments.child](arguments.networks[0], arguments.inputs[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**found, "peak": round(peak, 2)}, default=float))
        return
    rows = measured(Gathered(arguments.results), arguments)
    keys = ("case", "network", "inputs", "which", "seconds", "second budget", "peak")
    print(tabulate([[row.get(key, "") for key in keys] for row in rows], keys, floatfmt=".3g"))


if __name__ == "__main__":
    main()
