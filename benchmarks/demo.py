"""What the README shows of the trained example: ``python benchmarks/demo.py [--results benchmarks/results/demo.json]``.

Runs what ``make demo`` runs, and the same network as an ONNX file with a budget of latency, as a user would, in
processes of their own. Keeps what they print, the seconds of each, and the parts of the 2,000 test images that are right.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gathered import RESULTS, Gathered

ROOT = Path(__file__).parents[1]

OPTIMIZE = (
    "-m", "convrewrite", "optimize", "examples/fashion/fashion.pt", "--factory", "examples/fashion/model.py:fashion_resnet",
    "--rule", "separable", "--calib", "examples/fashion/calibration.npz", "-o", "demo-out",
)  # fmt: skip
"""The main job of ``make demo``."""

ONNX = (
    "-m", "convrewrite", "optimize", "fashion.onnx", "--rule", "balanced", "--budget", "latency=0.6", "--calib",
    "examples/fashion/calibration.npz", "-o", "out",
)  # fmt: skip
"""The ONNX example of the README."""


def said(words: Sequence[str], folder: Path) -> tuple[str, float]:
    """What Python prints when it is given these words in a folder that shows the examples; and the seconds that took."""
    started = time.perf_counter()
    ran = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise SystemExit(f"{' '.join(words)}: expected success, found status {ran.returncode}: {ran.stderr[-2000:]}")
    return ran.stdout, time.perf_counter() - started


def printed(text: str) -> list[str]:
    """The lines of a report, without the one that names the machine: it says nothing of the result."""
    lines = text.splitlines()
    tool = next((i for i, line in enumerate(lines) if line.startswith("convrewrite ")), len(lines))
    return [*lines[: tool + 1], *lines[tool + 2 :]]


def right(text: str) -> dict[str, float]:
    """``fashion.pt: 94.10% of 2,000 test images`` -> the part by the file's or folder's name."""
    return {name: float(part) / 100 for name, part in re.findall(r"^(\S+): ([\d.]+)% of", text, re.MULTILINE)}


def shown() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    held = tempfile.TemporaryDirectory()
    folder = Path(held.name)
    (folder / "examples").symlink_to(ROOT / "examples")
    return held, folder


def demo() -> dict[str, Any]:
    held, folder = shown()
    with held:
        text, seconds = said(OPTIMIZE, folder)
        evaluated, _ = said(
            ("examples/fashion/evaluate.py", "examples/fashion/fashion.pt", "demo-out/model.onnx"), folder
        )
    return {"printed": printed(text), "evaluated": evaluated.splitlines(), "seconds": round(seconds, 1)}


def of_an_onnx_file() -> dict[str, Any]:
    held, folder = shown()
    with held:
        said(("examples/fashion/export.py", "fashion.onnx"), folder)
        text, seconds = said(ONNX, folder)
        evaluated, _ = said(("examples/fashion/evaluate.py", "fashion.onnx", "out"), folder)
    latency = re.search(r"^ONNX latency +\S+ \S+ +\S+ \S+ +([\d.]+)x", text, re.MULTILINE)
    agreement = re.search(r"top-1 agreement ([\d.]+) %", " ".join(text.split()))
    if latency is None or agreement is None:
        raise SystemExit(f"expected a report with latency and top-1 agreement, found {text[:2000]}")
    parts = list(right(evaluated).values())
    return {
        "latency": float(latency[1]), "held_out_agreement": float(agreement[1]) / 100, "before": parts[0], "top1": parts[1],
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "demo.json")
    arguments = parser.parse_args()
    gathered = Gathered(arguments.results)
    print("\n".join(gathered.row({"example": "demo"}, demo)["printed"]))
    print(gathered.row({"example": "onnx"}, of_an_onnx_file))


if __name__ == "__main__":
    main()
