"""int8 of the original and of what it is rewritten to, and what even ranges between stages are worth.

    python benchmarks/int8.py [--network example vgg] [--seed 0] [--macs 0.5 0.25] [--results FILE]

The rule ``balanced`` within a budget of MACs, refined where ``optimize`` does that by itself, from the 1,024 unlabelled images of
the example. Seven rows a network:
original, rewritten, int8 of both, int8 of the rewritten without scales between its stages, and both again where options were
chosen by what they do once they are int8. ``time`` is a part of the
original's in onnxruntime at one thread, ``lost`` are points of top-1 on 10,000 test images, ``parity`` the relative error to
the float file that a row was made of, on held-out images.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gathered import Gathered
from judging import Judge, judge_of, told, with_networks
from tabulate import tabulate

import convrewrite
from convrewrite.onnx_files import OnnxModel
from convrewrite.quantising import quantise_file
from convrewrite.runtime import compare_programs, measure_fidelity
from convrewrite.targets import OnnxRuntime, Program

ROWS = (
    "original", "rewritten", "int8 of the original", "int8 of the rewritten", "int8 of the rewritten, no scales",
    "rewritten for int8", "int8 of the rewritten for int8",
)  # fmt: skip
MADE = {2: (0, True), 3: (1, True), 4: (1, False), 6: (5, True)}
"""Rows that are int8: the row that each is made of, and whether scales between stages are tried."""


def rows(network: str, seed: int, part: float) -> list[dict[str, Any]]:
    judge, data = judge_of(network, seed), judge_of(network, seed).calibration("data")
    asked: dict[str, Any] = {"budget": {"macs": part}, "measure": False}
    results = {
        index: convrewrite.optimize(judge.model, judge.inputs[0], ["balanced"], data, int8=int8, **asked)
        for index, int8 in ((1, False), (5, True))
    }
    macs = {index: result.report.totals.macs.ratio for index, result in results.items()}
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{index}.onnx" for index in range(len(ROWS))]
        convrewrite.export(judge.model, judge.inputs, files[0])
        for index, result in results.items():
            convrewrite.export(result.model, judge.inputs, files[index])
        ways = {
            index: quantise_file(files[of], files[index], data.fit, data.held_out, original=files[0], scales=scales)
            for index, (of, scales) in MADE.items()
        }
        found = []
        for index, label in enumerate(ROWS):
            source, _ = MADE.get(index, (index, True))
            parity = measure_fidelity(OnnxModel(files[source]), OnnxModel(files[index]), data.held_out).worst_error
            way = ways[index].way.describe() if index in ways else ""
            found.append(
                {"row": label, "way": way, "parts": round(macs.get(source, 1.0), 4), **judged(judge, files, index)}
            )
            found[-1]["parity"] = round(parity, 5)
    return found


def judged(judge: Judge, files: list[Path], index: int) -> dict[str, Any]:
    model = OnnxModel(files[index])
    scores = torch.cat([next(iter(model(batch).values())) for batch in judge.images.split(500)])
    kl = (judge.scores.softmax(1) * (judge.scores.log_softmax(1) - scores.log_softmax(1))).sum(1).mean()
    right = float((scores.argmax(1) == judge.labels).double().mean())
    inputs = judge.inputs
    ratio = compare_programs(Program(files[0]), Program(files[index]), inputs, OnnxRuntime()).ratio
    return {
        "bytes": files[index].stat().st_size, "time": round(ratio, 3), "top1": right,
        "lost": round(100 * (judge.right - right), 3), "kl": round(float(kl), 6),
    }  # fmt: skip


def table(network: str, seed: int, part: float) -> dict[str, Any]:
    return {"table": rows(network, seed, part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_networks(parser)
    parser.set_defaults(network=["example", "vgg"])
    parser.add_argument("--macs", type=float, nargs="*", default=[0.5, 0.25])
    arguments = parser.parse_args()
    gathered, found = Gathered(arguments.results), []
    for network in arguments.network:
        for seed in arguments.seed:
            for part in arguments.macs:
                asked = {"network": network, "seed": seed, "asked": f"macs={part:g}"}
                made = gathered.row(asked, partial(table, network, seed, part))
                found += [asked | row for row in made["table"]]
    keys = "network seed asked row way parts bytes time top1 lost kl parity"
    headers = ("network", "seed", "asked", "", "how", "MACs", "bytes", "time", "top-1", "lost", "KL", "parity")
    print(tabulate([told(row, keys) for row in found], headers, disable_numparse=True))


if __name__ == "__main__":
    main()
