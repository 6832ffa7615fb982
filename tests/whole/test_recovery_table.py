"""The table of docs/recover.md says what the results file of its benchmark says."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_of_the_table_is_one_of_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text(encoding="utf-8"))
    wanted = {
        f"| {r['network']}, {r['seed']} | {r['macs']:g} | {r['start']} | {r['recipe']} | {r['steps']} "
        f"| {r['lost_before']:.2f} | {r['lost']:.2f} | {r['held_out_before']:.4f} | {r['held_out']:.4f} |"
        for r in rows
    }
    lines = (ROOT / "docs" / "recover.md").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if line.startswith(("| example, ", "| resnet20, ", "| vgg, "))} == wanted
