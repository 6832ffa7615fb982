"""The tables of docs/frontier.md, from what ``candidates.py`` wrote: ``python benchmarks/candidates_table.py``."""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "candidates.json"
KINDS = ("smaller kernel", "inner width", "dropped branch")
RESOURCES = {"macs": "MACs", "seconds": "time"}
NONE = 1e-6
"""Smaller effects, in nats, count as this one where effects are divided, as their ratios mean nothing."""

Networks = Sequence[Mapping[str, Any]]


def read() -> Networks:
    found: Networks = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def alone() -> str:
    """Markdown: of every kind, how many candidates do less harm than options of the same sites at no more cost."""
    lines = [
        "| network | candidate | tried | cost | better | harm, times theirs | cheaper than any |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for network in read():
        for kind in KINDS:
            rows = [row for row in network["candidates"] if row["kind"] == kind]
            for resource, word in RESOURCES.items():
                if rows and f"options at no more {resource}" in rows[0]:
                    cells = " | ".join(_beside(rows, resource))
                    lines.append(f"| {_name(network)} | {kind} | {len(rows)} | {word} | {cells} |")
    return "\n".join(lines)


def _beside(rows: Sequence[Mapping[str, Any]], resource: str) -> tuple[str, str, str]:
    """How many are better than options that cost no more, the median of the ratios of effects, and how many cost less than any
    option."""
    pairs = [(row["effect"], row[f"options at no more {resource}"]) for row in rows]
    known = [(max(effect, NONE), max(least, NONE)) for effect, least in pairs if least is not None]
    better = sum(1 for effect, least in known if effect < least)
    ratio = f"{statistics.median(effect / least for effect, least in known):.2g}" if known else ""
    return f"{better} of {len(known)}", ratio, str(len(pairs) - len(known))


def frontier() -> str:
    """Markdown: the least total effect of plans within budgets, with and without each kind."""
    headers = ("network", "budget", "the tool's options", *(f"and {kind}" for kind in KINDS))
    lines = ["| " + " | ".join(headers) + " |", "|---|---|" + "--:|" * (len(headers) - 2)]
    for network in read():
        for row in network["frontiers"]:
            if all(row.get(kind) is None for kind in ("single sites", *KINDS)):
                continue
            cells = ["" if row.get(kind) is None else f"{row[kind]:.5f}" for kind in ("single sites", *KINDS)]
            budget = f"{RESOURCES[row['resource']]} {row['budget']:g}"
            lines.append(f"| {_name(network)} | {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name(network: Mapping[str, Any]) -> str:
    return f"{network['network']}, seed {network['seed']}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{alone()}\n\n{frontier()}")


if __name__ == "__main__":
    main()
