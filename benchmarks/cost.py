"""Time and memory of whole runs, each as a process.

    python benchmarks/cost.py resnet18 [--inputs 64 128 256 512] [--rule separable] [--results FILE]

A network of the named shape with random weights is rewritten at 224 x 224 and a uniform ratio of 0.5 on smoothed noise.
Prints wall seconds, peak resident memory of the process, and which share of the fit went into forward passes, moments and
solves. Memory is the operating system's own figure for a child process that does nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from gathered import Gathered
from networks import NETWORKS, network_and_inputs

import convrewrite
from convrewrite.rules import builtin_rules, load_rule_file


def child(arguments: argparse.Namespace) -> None:
    model, images = network_and_inputs(arguments.network, arguments.inputs[0], arguments.size)
    rules = [
        rule.model_copy(update={"ratio": arguments.ratio})
        for rule in load_rule_file(builtin_rules()[arguments.rule]).rule
    ]
    started = time.perf_counter()
    result = convrewrite.optimize(model, images[:1], rules, images, measure=False, memory=int(arguments.memory * 2**30))
    rewritten = sum(site.action == "rewritten" for site in result.report.sites)
    print(json.dumps({"fit": time.perf_counter() - started, "sites": rewritten, "stages": result.report.seconds}))


def measure(arguments: argparse.Namespace, inputs: int) -> dict[str, Any]:
    """One run as a child, which does nothing else; ``peak`` in GB, the rest in seconds."""
    words = [arguments.network, "--inputs", inputs, "--size", arguments.size, "--ratio", arguments.ratio]
    words += ["--rule", arguments.rule, "--memory", arguments.memory, "--child"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run failed with status {status}")
    figures = json.loads(text.splitlines()[-1])
    wall, peak = time.perf_counter() - started, usage.ru_maxrss / 2**20
    processor = usage.ru_utime + usage.ru_stime
    return {"wall": round(wall, 1), "cpu": round(processor, 1), "peak": round(peak, 2), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--inputs", type=int, nargs="+", default=[256])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rule", default="separable")
    parser.add_argument("--memory", type=float, default=4.0, help="GB, as --memory of the command line")
    parser.add_argument("--results", type=Path, help="gather the rows in this file, and measure none that it has")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    gathered = Gathered(arguments.results)
    for inputs in arguments.inputs:
        asked = {key: getattr(arguments, key) for key in ("network", "size", "ratio", "rule", "memory")}
        found = gathered.row(asked | {"inputs": inputs}, partial(measure, arguments, inputs))
        print(f"{arguments.network}, {inputs} inputs, {arguments.rule} at {arguments.ratio}: {found['sites']} sites")
        print(f"wall {found['wall']:.0f} s, cpu {found['cpu']:.0f} s, peak memory {found['peak']:.2f} GB")
        for stage, seconds in found["stages"].items():
            print(f"  {stage:<16} {seconds:7.1f} s  {seconds / found['fit']:6.1%}")


if __name__ == "__main__":
    main()
