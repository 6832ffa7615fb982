"""The figures of README.md and docs/, from what benchmarks wrote into ``benchmarks/results``.

    python benchmarks/figures.py [--write]

A document marks what comes from a file with ``<!-- figures: NAME -->`` before it and ``<!-- end of figures -->`` behind it, on
lines of their own. ``--write`` puts the text of every ``NAME`` there as it follows from the files now; without it the documents
that differ are named. A test holds the two equal.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gathered import RESULTS, held, rows_of
from tabulate import tabulate

ROOT = Path(__file__).parents[1]

DOCUMENTS = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in (
            "cli.md",
            "index.md",
            "results.md",
            "fits.md",
            "runtimes.md",
            "int8.md",
            "performance.md",
            "outputs.md",
        )
    ),
)
"""The documents that show results."""

MARKED = re.compile(r"<!-- figures: ([\w-]+) -->\n(.*?)<!-- end of figures -->\n", re.DOTALL)
"""A name, and the text between its marks."""

SITES_SHOWN = 4
"""Sites of the demo's report in the README: enough to see what a row says."""

SHORTEST = 0.5
"""Fewest seconds of a stage that gets a row."""

Row = Mapping[str, Any]


def markdown(headers: str, rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of Markdown; ``headers`` are separated by ``|``; all but the first ``left`` columns are aligned to the right."""
    names = headers.split("|")
    rule = "|" + "---|" * left + "--:|" * (len(names) - left)
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def code(text: str) -> str:
    return f"```\n{text}\n```\n"


def percent(part: float, digits: int = 2) -> str:
    return f"{100 * part:.{digits}f} %"


def chosen(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def only(rows: Iterable[Row], **wanted: object) -> Row:
    """The row with these values; LookupError where none was measured."""
    found = chosen(rows, **wanted)
    if not found:
        raise LookupError(f"expected a row with {wanted}, found none; measure it first")
    return found[0]


def demo() -> str:
    """What ``make demo`` printed, without most of its sites."""
    found = only(rows_of(RESULTS / "demo.json"), example="demo")
    lines = [line.rstrip() for line in found["printed"]]
    first = next(i for i, line in enumerate(lines) if line.startswith("----"))  # the table of sites is the first
    last = next(i for i in range(first, len(lines)) if not lines[i])
    more = f"... ({last - first - 1 - SITES_SHOWN} more sites)"
    printed = [*lines[: first + 1 + SITES_SHOWN], more, *lines[last:]]
    return code("\n".join([*printed, *found["evaluated"]]))


def demo_short() -> str:
    """The headline, the totals and the test images of what ``make demo`` printed."""
    found = only(rows_of(RESULTS / "demo.json"), example="demo")
    lines = [line.rstrip() for line in found["printed"]]
    headline = lines[: next(i for i, line in enumerate(lines) if line.startswith("Input "))]
    totals = lines[lines.index("Totals") + 1 : next(i for i, line in enumerate(lines) if line.startswith("Fidelity: "))]
    return code("\n".join([*headline, "", *totals, *found["evaluated"]]))


def demo_onnx() -> str:
    found = only(rows_of(RESULTS / "demo.json"), example="onnx")
    return (
        f"It takes {found['latency']:.2f} of the time in onnxruntime then, {percent(found['top1'])} of the 2,000 test images are "
        f"right instead of\n{percent(found['before'])}, and {percent(found['held_out_agreement'], 1)} of the 205 held-out images "
        "keep their class.\n"
    )


def fidelity() -> str:
    """The whole table of ``fidelity.py`` on the example."""
    rows = chosen(rows_of(RESULTS / "fidelity.json"), network="example", seed=0, weighting=False)
    asked = list(dict.fromkeys((row["structure"], row["asked"]) for row in rows))
    order = sorted(
        rows, key=lambda r: (asked.index((r["structure"], r["asked"])), ("data", "none", "weights").index(r["inputs"]))
    )
    cells = [
        (r["structure"], r["inputs"], r["sites"], f"{r['asked']:.2f}", f"{r['ratio']:.3f}", f"{r['top1']:.2%}",
         f"{r['lost']:.2f}", f"{r['agreement']:.2%}", f"{r['kl']:.4f}", f"{r['seconds']:.0f}")
        for r in order
    ]  # fmt: skip
    headers = ("structure", "inputs", "sites", "asked", "ratio", "top-1", "lost", "agreement", "KL", "seconds")
    before = f"original: {rows[0]['before']:.2%} of 10,000 test images"
    return code(f"{before}\n\n{tabulate(cells, headers, disable_numparse=True)}")


def budgets() -> str:
    """The example's rows of ``budgets.py``; those of single structures are sorted by what they lose."""
    rows = chosen(_plans(), network="example", seed=0, fast=False)
    alike = sorted((row for row in rows if row["asked"].startswith("all sites")), key=lambda row: row["lost"])
    cells = [
        (_asked(r["asked"]), f"{r['macs']:.3f}", f"{r['lost']:.2f}", percent(r["agreement"]), f"{r['kl']:.4f}",
         f"{r['held_out_kl']:.4f}")
        for r in [*(row for row in rows if row not in alike), *alike]
    ]  # fmt: skip
    return markdown("asked|MACs left|top-1 lost|agreement|KL, test images|KL, held-out", cells)


def budgets_more() -> str:
    """An uneven network, and ``--fast``, in two sentences."""
    uneven, rows = (
        chosen(_plans(), network="uneven", fast=False),
        chosen(_plans(), network="example", seed=0, fast=True),
    )
    planned = only(uneven, asked="macs=0.25")["held_out_kl"]
    single = min(row["held_out_kl"] for row in uneven if row["asked"].startswith("all sites"))
    half, quarter = (only(rows, asked=f"macs={part}") for part in (0.5, 0.25))
    return (
        "On a network whose layers differ more in sensitivity (`--network uneven`) the held-out KL of `macs=0.25` is "
        f"{planned:.4f},\nthat of the best single structure {single:.4f}. With `--fast`, {half['lost']:.2f} points are lost at "
        f"0.5 and {quarter['lost']:.2f} at 0.25 on the\nnetwork above; the KL on the test images is {half['kl']:.4f} and "
        f"{quarter['kl']:.4f}.\n"
    )


def methods() -> str:
    """Points of top-1 that this tool and the methods of two papers lose, network by network."""
    papers = rows_of(RESULTS / "papers.json")
    names = {
        "svd": "whitened SVD, ranks by energy (BALF)", "tucker": "Tucker-2 in the covariance metric (Kalle et al.)",
        "cp": "CP in the covariance metric (Kalle et al.)", "tucker-energy": "the same Tucker-2, ranks by energy",
        "cp-energy": "the same CP, ranks by energy",
    }  # fmt: skip
    columns = list(dict.fromkeys((row["network"], row["seed"], row["asked"]) for row in papers if row["asked"] >= 0.25))
    columns.sort(key=lambda column: (column[0], column[1], -column[2]))
    own = {(r["network"], r["seed"], r["asked"]): r for r in chosen(_plans(), fast=False)}
    plan = [own.get((network, seed, f"macs={part:g}")) for network, seed, part in columns]
    cells = [["`--budget macs`", *(_lost(row) for row in plan)]]
    for method, name in names.items():
        found = [chosen(papers, method=method, network=n, seed=s, asked=part) for n, s, part in columns]
        if any(found):
            cells.append([name, *(_lost(rows[0] if rows else None) for rows in found)])
    headers = "method|" + "|".join(f"{network}, {part:g}" for network, _, part in columns)
    return markdown(headers, cells)


def networks() -> str:
    """Points of top-1 that plans of several budgets lose on every network that ``training.py`` makes, and the most of them."""
    rows = [r for r in chosen(_plans(), fast=False) if r["network"] != "uneven" and r["asked"].startswith("macs=")]
    columns = sorted({(row["network"], row["seed"]) for row in rows})
    lost = {(row["network"], row["seed"], row["asked"]): row["lost"] for row in rows}
    cells = []
    for asked in sorted({row["asked"] for row in rows}, key=lambda text: -float(text.removeprefix("macs="))):
        found = [lost.get((network, seed, asked)) for network, seed in columns]
        known = [one for one in found if one is not None]
        most = f"{max(known):.2f}" if len(known) == len(columns) else ""
        cells.append([f"`{asked}`", *("" if one is None else f"{one:.2f}" for one in found), most])
    headers = "asked|" + "|".join(f"{network}, seed {seed}" for network, seed in columns) + "|most"
    return markdown(headers, cells)


def pitch() -> str:
    """The latest row of either kind of ``pitch.py``."""
    rows = {row["fast"]: row for row in held(RESULTS / "pitch.json") if row["frames"] == 205}
    cells = [
        (name, f"{rows[fast]['output_error']:.3f}", percent(rows[fast]["voiced_within"], 1),
         percent(rows[fast]["voicing_kept"], 1))
        for name, fast in (("thorough", False), ("`--fast`", True))
    ]  # fmt: skip
    return markdown("run|relative output error|within 25 cents|voicing decisions", cells)


def detection() -> str:
    """Every row of ``detection.py``."""
    cells = [
        (f"{row['macs']:g}", "yes" if row["refined"] else "no", f"{row['before']:.3f}", f"{row['after']:.3f}",
         percent(row["relative_error"], 1), percent(row["unexplained"], 2))
        for row in held(RESULTS / "detection.json")
    ]  # fmt: skip
    names = "MACs|refined|mean average precision before|after|relative error of the scores|unexplained variance"
    return markdown(names, cells)


def refinement() -> str:
    """Every row of ``refinement.py``, and the most that any network loses at a part of its MACs."""
    rows = held(RESULTS / "refinement.json")
    cells = [
        (f"{r['network']}, {r['seed']}", f"{r['macs']:g}", f"{r['lost_before']:.2f}", f"{r['lost_after']:.2f}",
         *(f"{r[key]:.4f}" for key in ("kl_before", "kl_after", "held_out_before", "held_out_after")), str(r["steps"]))
        for r in rows
    ]  # fmt: skip
    for part in dict.fromkeys(row["macs"] for row in rows):
        most = (f"{max(row[key] for row in chosen(rows, macs=part)):.2f}" for key in ("lost_before", "lost_after"))
        cells.append(("the most of all", f"{part:g}", *most, "", "", "", "", ""))
    return markdown("network, seed|MACs|lost|refined|KL|refined|held out|refined|steps", cells)


def speed() -> str:
    """Every row of ``speed.py``."""
    cells = [
        (r["network"], r["runtime"], *(f"{r[key]:.2f}x" for key in ("macs", "time", "predicted")), f"{r['kept']:.2f}")
        for r in rows_of(RESULTS / "speed.json")
    ]
    return markdown("network|runtime|MACs|time|time as predicted|speed-up as a part of the MACs'", cells, left=2)


def int8() -> str:
    """Every row of ``int8.py``."""
    cells = [
        (row["network"], row["asked"], r["row"], r["way"], f"{r['parts']:.2f}", f"{r['bytes']:,}", f"{r['time']:.2f}",
         f"{r['lost']:.2f}", f"{abs(r['kl']):.5f}", f"{r['parity']:.4f}")
        for row in rows_of(RESULTS / "int8.json")
        for r in row["table"]
    ]  # fmt: skip
    return markdown("network|asked|model|how|MACs left|bytes|time|top-1 lost|KL|parity", cells, left=4)


def never_slower() -> str:
    """Every row of ``never_slower.py``."""
    cells = [
        (row["asked"], "`--any-speed`" if row["any_speed"] else "none that is slower", f"{row['time']:.2f}", f"{row['kl']:.4f}",
         f"{row['lost']:.2f}")
        for row in rows_of(RESULTS / "never_slower.json")
    ]  # fmt: skip
    return markdown("asked|options|of the original's time|KL|top-1 lost", cells, left=2)


def few_inputs() -> str:
    rows = held(RESULTS / "few_inputs.json")
    cells = [
        (str(row["inputs"]), f"{100 * row['lost']:.2f}", percent(row["agreement"]), f"{row['kl']:.4f}") for row in rows
    ]
    return markdown("inputs|top-1 lost, points|agreement with the original|KL", cells)


OWN_TIME = {
    "import": "`import convrewrite`", "--version": "`convrewrite --version`", "--help": "`convrewrite --help`",
    "demo": "the main job of `make demo`", "separable": "`separable`, up to the verified ONNX file",
    "plan": "a plan for half the MACs", "second budget": "then one for two fifths",
    "latency": "`balanced`, `latency=0.5`, up to the verified ONNX file",
    "whole": "`balanced`, `macs=0.6`, up to the verified ONNX file",
}  # fmt: skip
"""What each case of ``own_time.py`` is."""


def own_time() -> str:
    """Seconds before, where they were measured, and now, and gigabytes at most."""
    rows = rows_of(RESULTS / "own_time.json")
    parts = [
        row | {"case": "second budget", "seconds": row["second budget"], "peak": None}
        for row in rows
        if "second budget" in row
    ]
    cells = []
    for row in (row for row in (*rows, *parts) if row["which"] == "now"):
        same = chosen(rows + parts, case=row["case"], which="before")
        before = [_seconds(other) for other in same if other.get("network") == row.get("network")]
        peak = f"{row['peak']:.1f} GB" if row.get("peak") else ""
        cells.append((row.get("network", ""), OWN_TIME[row["case"]], *(before or [""]), _seconds(row), peak))
    return markdown("network|what|before|now|memory", cells, left=2)


def stages() -> str:
    """Where the time of a whole run goes."""
    row = only(rows_of(RESULTS / "own_time.json"), case="separable", network="resnet18", which="now")
    longest = sorted(row["stages"].items(), key=lambda entry: -entry[1])
    cells = [(name, f"{seconds:.1f} s") for name, seconds in longest if seconds >= SHORTEST]
    return markdown("stage|time", cells)


def _seconds(row: Row) -> str:
    return f"{row['seconds']:.2f} s" if row["seconds"] < 1 else f"{row['seconds']:.0f} s"


def _plans() -> list[Row]:
    """The rows of ``budgets.py`` as the tool is by default: where one was measured with and without refinement, the one with
    it."""
    rows = sorted(rows_of(RESULTS / "budgets.json"), key=lambda row: row["refine"])
    return list({(row["network"], row["seed"], row["fast"], row["asked"]): row for row in rows}.values())


def _asked(text: str) -> str:
    found = re.match(r"all sites (\w+)", text)
    return f"all sites `{found[1]}`" if found else f"`{text}`"


def _lost(row: Row | None) -> str:
    return "" if row is None else f"{row['lost']:.2f}"


TEXTS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "demo-short": demo_short,
    "demo-onnx": demo_onnx,
    "fidelity": fidelity,
    "budgets": budgets,
    "budgets-more": budgets_more,
    "methods": methods,
    "networks": networks,
    "detection": detection,
    "pitch": pitch,
    "refinement": refinement,
    "speed": speed,
    "int8": int8,
    "never-slower": never_slower,
    "few-inputs": few_inputs,
    "own-time": own_time,
    "stages": stages,
}


def written(text: str) -> str:
    """A document's text with all its figures as they follow from the files now."""

    def anew(found: re.Match[str]) -> str:
        return f"<!-- figures: {found[1]} -->\n{TEXTS[found[1]]()}<!-- end of figures -->\n"

    return MARKED.sub(anew, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the figures into the documents")
    arguments = parser.parse_args()
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        try:
            after = written(before)
        except (LookupError, FileNotFoundError) as error:
            raise SystemExit(f"{document.relative_to(ROOT)}: {error}") from error
        if before != after:
            print(f"{document.relative_to(ROOT)} differs" + (", written anew" if arguments.write else ""))
        if arguments.write:
            document.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
