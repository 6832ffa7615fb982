"""Planning as a whole: ``python benchmarks/plan.py resnet18 --budget latency=0.5 [--fast] [--inputs 256] [--apply]``.

A network of the named shape with random weights is planned with the rule ``balanced`` at 224 x 224 on smoothed noise.
Prints the seconds of planning and of its stages, and what the plan promises; with ``--apply`` the plan is fitted and the
latency of the whole model measured as well: asked, predicted, measured, and the speed-up against that of the MACs.
"""

import argparse
import time

from networks import NETWORKS, network_and_inputs

import convrewrite
from convrewrite.values import budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--budget", action="append", required=True)
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--apply", action="store_true")
    arguments = parser.parse_args()
    model, images = network_and_inputs(arguments.network, arguments.inputs, arguments.size)
    asked = budget(arguments.budget)
    started = time.perf_counter()
    plan = convrewrite.plan(model, images[:1], ["balanced"], images, asked, fast=arguments.fast)
    seconds = time.perf_counter() - started
    rewritten = [site for site in plan.sites if site.option is not None]
    print(f"{arguments.network}, {arguments.inputs} inputs{', fast' if arguments.fast else ''}, asked {asked}")
    print(
        f"planned in {seconds:.0f} s: {len(rewritten)} of {len(plan.sites)} sites; promised {plan.predicted}",
        flush=True,
    )
    for site in rewritten:
        assert site.option is not None
        print(f"  {site.name}: {site.option.option().describe()}")
    if not arguments.apply:
        return
    result = convrewrite.apply(model, images[:1], plan, images)
    latency, macs = result.report.totals.onnx_latency_seconds, result.report.totals.macs
    predicted = result.report.totals.predicted_onnx_latency_seconds
    assert latency is not None and predicted is not None
    ratio = macs.after / macs.before
    print(f"latency: measured {latency.ratio:.3f} of the original's, predicted {predicted / latency.before:.3f}")
    print(f"macs: {ratio:.3f}; speed-up {1 / latency.ratio:.2f}, the MACs promise {1 / ratio:.2f}")
    print(f"refused: {result.refused}")


if __name__ == "__main__":
    main()
