"""What a detector keeps whose scores and boxes are in one output.

    python benchmarks/detection.py [--macs 0.5 0.25] [--images 320] [--refine both]

The trained detector of ``examples/detection``, of the shape of YOLOv8, with the rule ``balanced`` and unlabelled images of the
size that it was trained on. Told is the mean average precision on other images, before and after, beside what the report says.
Writes ``benchmarks/results/detection.json``; rows that it has already are kept.
"""

import argparse
import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import convrewrite

RESULTS = Path(__file__).parent / "results" / "detection.json"
EXAMPLE = Path(__file__).parents[1] / "examples" / "detection"

CALIBRATION_SEED, TEST_SEED, TEST_IMAGES = 5, 77, 400
"""Seeds of the drawn images; the network was trained on others, and is judged on so many."""


@dataclass(frozen=True)
class Row:
    """One run: how it was asked, the mean average precision, and what its report says."""

    macs: float
    refined: bool
    images: int
    before: float
    after: float
    relative_error: float
    unexplained: float | None
    macs_left: float
    seconds: float
    refused: str | None


def measure(evaluate: Any, images: Tensor, macs: float, refined: bool) -> Row:
    """The network rewritten with these images, judged on others."""
    model, started = evaluate.trained(), time.perf_counter()
    result = convrewrite.optimize(
        model, images[:1], ["balanced"], images, {"macs": macs}, refine=None if refined else False, measure=False,
        any_speed=True,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    shown, boxes = evaluate.draw(TEST_IMAGES, seed=TEST_SEED)
    with torch.no_grad():
        before, after = (evaluate.mean_average_precision(one, shown, boxes) for one in (model, result.model))
    (output,), left = result.report.fidelity, result.report.totals.macs.ratio
    return Row(
        macs, refined, len(images), before, after, output.relative_error, output.unexplained, left, seconds,
        result.refused,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument(
        "--refine", choices=["no", "yes", "both"], default="both", help="as a run does by itself, or not"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLE))
    evaluate = importlib.import_module("evaluate")
    images = evaluate.draw(arguments.images, seed=CALIBRATION_SEED)[0]
    held = json.loads(arguments.results.read_text()) if arguments.results.is_file() else []
    rows = {(row["macs"], row["refined"], row["images"]): Row(**row) for row in held}
    for refined in {"no": (False,), "yes": (True,), "both": (False, True)}[arguments.refine]:
        for macs in arguments.macs:
            if (macs, refined, len(images)) not in rows:
                rows[macs, refined, len(images)] = measure(evaluate, images, macs, refined)
                print(rows[macs, refined, len(images)], flush=True)
    arguments.results.write_text(json.dumps([asdict(row) for row in rows.values()], indent=2) + "\n")
    headers = ("MACs", "refined", "mAP before", "after", "relative error", "unexplained", "seconds")
    cells = [
        (f"{r.macs_left:.3f}", "yes" if r.refined else "no", f"{r.before:.3f}", f"{r.after:.3f}", f"{r.relative_error:.3f}",
         f"{r.unexplained:.4f}", f"{r.seconds:.0f}")
        for r in rows.values()
    ]  # fmt: skip
    print(tabulate(cells, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
