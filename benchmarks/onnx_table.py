"""The table of docs/onnx.md, from what ``onnx_files.py`` wrote: ``python benchmarks/onnx_table.py``."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "onnx_files.json"

HEADERS = ("file", "from", "nodes", "by onnxruntime", "convolutions", "rewritten", "MACs", "full rank", "rest")


def table() -> str:
    """Markdown: a row a file, those that came through first."""
    outcomes: Mapping[str, Mapping[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = sorted(outcomes.items(), key=lambda item: item[1]["end"] != "through")
    lines = ["| " + " | ".join(HEADERS) + " |", "|---|---|" + "--:|" * 6 + "---|"]
    return "\n".join([*lines, *(_row(name, outcome) for name, outcome in rows)])


def summary() -> str:
    """How many files came through, in a sentence."""
    outcomes = json.loads(RESULTS.read_text(encoding="utf-8")).values()
    through = [one for one in outcomes if one["end"] == "through"]
    reached = [one for one in through if one["budget"] == "reached"]
    return (
        f"{len(through)} of {len(outcomes)} files come through; {len(reached)} reach 0.6 of their MACs, the others end in the "
        "reason why not."
    )


def _row(name: str, outcome: Mapping[str, Any]) -> str:
    source = outcome["source"]
    if outcome["end"] != "through":
        return f"| {name} | {source} | | | | | | | {outcome['end']}: {outcome['message'].split(';')[0]} |"
    opaque = sum(outcome["opaque"].values())
    macs = f"{outcome['macs']:.2f}x" if outcome["budget"] == "reached" else "not met"
    rest = "byte for byte" if not outcome["changed"] else f"{len(outcome['changed'])} changed"
    cells = (
        name, source, outcome["nodes"], opaque or "none", outcome["convolutions"], outcome["rewritten"], macs,
        f"{outcome['full_rank']:.0e}", rest,
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(summary() + "\n\n" + table())
