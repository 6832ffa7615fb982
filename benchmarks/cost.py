"""Time and memory of a whole run, as a process: ``python benchmarks/cost.py resnet18 [--inputs 256] [--rule separable]``.

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

from networks import NETWORKS, network_and_inputs

import convrewrite
from convrewrite.rules import builtin_rules, load_rule_file


def child(arguments: argparse.Namespace) -> None:
    model, images = network_and_inputs(arguments.network, arguments.inputs, arguments.size)
    rules = [
        rule.model_copy(update={"ratio": arguments.ratio})
        for rule in load_rule_file(builtin_rules()[arguments.rule]).rule
    ]
    started = time.perf_counter()
    result = convrewrite.optimize(model, images[:1], rules, images, measure=False, memory=int(arguments.memory * 2**30))
    rewritten = sum(site.action == "rewritten" for site in result.report.sites)
    print(json.dumps({"fit": time.perf_counter() - started, "sites": rewritten, "stages": result.report.seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rule", default="separable")
    parser.add_argument("--memory", type=float, default=4.0, help="GB, as --memory of the command line")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--child"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run failed with status {status}")
    figures = json.loads(text.splitlines()[-1])
    wall, peak = time.perf_counter() - started, usage.ru_maxrss / 2**20
    print(
        f"{arguments.network}, {arguments.inputs} inputs, {arguments.rule} at {arguments.ratio}: {figures['sites']} sites"
    )
    print(f"wall {wall:.0f} s, cpu {usage.ru_utime + usage.ru_stime:.0f} s, peak memory {peak:.2f} GB")
    for stage, seconds in figures["stages"].items():
        print(f"  {stage:<16} {seconds:7.1f} s  {seconds / figures['fit']:6.1%}")


if __name__ == "__main__":
    main()
