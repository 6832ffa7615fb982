"""What more there would be to choose from, and what it would win: ``python benchmarks/candidates.py --network example vgg``.

*Smaller kernel*: the middle of a kernel, 3 x 3 to 1 x 3, 3 x 1 or 1 x 1, solved for on the patches that are left. *Inner width*:
channels between two convolutions go, those first whose patches explain least of what the second gives, and the second is solved
for anew. *Dropped branch*: a residual block becomes its join, with an affine function of every channel of the skip, or with a
1 x 1, both fitted to what it had added up (PRACTISE, Wang et al. 2023).

Each is measured as the tool measures an option: KL on held-out calibration images with that alone changed. Beside it stands the
least sum of effects that options of the same sites have at no more MACs, or at no more seconds; and for every budget the least
total effect of a plan, from single sites' options alone, and with each kind of candidate besides. Test images and labels are
not looked at. The networks are those that the tool is developed on, of seed 1.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from candidates_made import Candidate, Pair, begin, dropped, pairs_of, smaller
from tabulate import tabulate

from convrewrite.pipeline import Run
from convrewrite.planning import THOROUGH, Item, choose, latency_table_of, survey, undominated
from convrewrite.process import at_work

RESULTS = Path(__file__).parent / "results" / "candidates.json"
BUDGETS = (0.6, 0.5, 0.4, 0.25, 0.15, 0.1)
"""Parts of the whole model's MACs, or of its sites' seconds, that plans are made for."""

RESOURCES = ("macs", "seconds")


def survey_options(started: Run, resource: str) -> list[dict[str, Any]]:
    """All options of all sites, with their costs and effects."""
    table = latency_table_of(started.work.prepared, started.work.settings) if resource == "seconds" else None
    rows: list[dict[str, Any]] = []
    for entry in survey(started.work, effort=THOROUGH, latency_table=table):
        if entry.options:
            kept = {"site": entry.site.name, "option": "kept", "macs": entry.site.cost.macs, "effect": 0.0}
            rows.append({**kept, "seconds": entry.seconds})
        for o in entry.options:
            told = {"site": entry.site.name, "option": o.candidate.option.describe(), "macs": o.candidate.cost.macs}
            rows.append({**told, "effect": o.effect, "seconds": getattr(o, "seconds", None)})
    return rows


Options = dict[str, list[Item]]
"""What is known of single sites: effect, MACs and seconds of every option; the first is the site as it is."""


def by_site(rows: Sequence[dict[str, Any]]) -> Options:
    found: Options = {}
    for row in rows:
        item = Item(float(row["effect"]), (float(row["macs"]), float(row["seconds"] or 0)))
        found.setdefault(row["site"], []).append(item)
    return found


def on_one(items: Sequence[Item], resource: int) -> list[Item]:
    """The same with one cost, those that another beats left out."""
    narrow = [Item(item.effect, (item.costs[resource],)) for item in items]
    return [narrow[index] for index in undominated(narrow)]


def added(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Every combination of two sites' options."""
    sums = [Item(a.effect + b.effect, (a.costs[0] + b.costs[0],)) for a in first for b in second]
    return [sums[index] for index in undominated(sums)]


def least_effect(items: Sequence[Item], cost: float) -> float | None:
    """The least effect within a cost; None where no option costs so little."""
    return min((item.effect for item in items if item.costs[0] <= cost * (1 + 1e-9)), default=None)


def frontier(options: Options, candidates: Sequence[Candidate], resource: str) -> list[dict[str, object]]:
    """The least total effect of plans within budgets, from single sites alone and with each kind of candidate."""
    index = RESOURCES.index(resource)
    single = {name: on_one(items, index) for name, items in options.items()}
    total = sum(items[0].costs[index] for items in options.values())
    kinds = sorted({candidate.kind for candidate in candidates})
    rows: list[dict[str, object]] = []
    for part in BUDGETS:
        row: dict[str, object] = {"resource": resource, "budget": part}
        for kind in ("", *kinds):
            groups = _groups(single, [c for c in candidates if c.kind == kind], resource)
            chosen = choose(groups, [part * total])
            effect = None if chosen is None else sum(g[i].effect for g, i in zip(groups, chosen, strict=True))
            row[kind or "single sites"] = effect
        rows.append(row)
    return rows


def _groups(single: dict[str, list[Item]], candidates: Sequence[Candidate], resource: str) -> list[list[Item]]:
    """Sites that candidates join are one group; each site is in one pair at most, the first that names it."""
    groups: list[list[Item]] = []
    taken: set[str] = set()
    for pair in dict.fromkeys(c.sites for c in candidates):
        if not taken & set(pair):
            taken |= set(pair)
            mine = [Item(c.effect, (getattr(c, resource),)) for c in candidates if c.sites == pair]
            alone = [single[name] for name in pair]
            groups.append([*(alone[0] if len(alone) == 1 else added(*alone)), *mine])
    return groups + [items for name, items in single.items() if name not in taken]


def made(network: str, started: Run) -> list[Candidate]:
    """Every candidate of a network; sites are printed as they are done."""
    found: list[Candidate] = []
    for space in started.work.prepared.search_spaces:
        if space.rank_ranges and space.site.spec.kernel_size == (3, 3):
            found += smaller(started, space.site)
            print(f"{network}: {space.site.name}", flush=True)
    for first, second in pairs_of(network, started):
        found += Pair(started, first, second).candidates()
        if network != "vgg":
            found += dropped(started, first, second)
        print(f"{network}: {first.name} and {second.name}", flush=True)
    return found


def study(network: str, seed: int, resources: Sequence[str], folder: Path | None) -> dict[str, object]:
    """All candidates of one network beside single sites' options, and the frontiers."""
    started = begin(network, seed)
    options: dict[str, Options] = {}
    for resource in resources:
        kept = None if folder is None else folder / f"{network}-{seed}-{resource}.json"
        rows = json.loads(kept.read_text()) if kept and kept.exists() else survey_options(started, resource)
        if kept and not kept.exists():
            kept.write_text(json.dumps(rows))
        options[resource] = by_site(rows)
    candidates = made(network, started)
    beside = []
    for candidate in candidates:
        row = asdict(candidate)
        for resource, known in options.items():
            sites = [on_one(known[name], RESOURCES.index(resource)) for name in candidate.sites]
            sums = sites[0] if len(sites) == 1 else added(*sites)
            row[f"options at no more {resource}"] = least_effect(sums, getattr(candidate, resource))
        beside.append(row)
    frontiers = [row for resource, known in options.items() for row in frontier(known, candidates, resource)]
    print(tabulate(beside, headers="keys", floatfmt=".4g"))
    print(tabulate(frontiers, headers="keys", floatfmt=".4g"), flush=True)
    return {"network": network, "seed": seed, "candidates": beside, "frontiers": frontiers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["example", "vgg"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resources", nargs="+", choices=RESOURCES, default=list(RESOURCES))
    parser.add_argument("--surveys", type=Path, help="a folder that keeps the surveys, which take the longest")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    results = {(row["network"], row["seed"]): row for row in known}
    with at_work(0):
        for network in arguments.network:
            found = study(network, arguments.seed, arguments.resources, arguments.surveys)
            results[network, arguments.seed] = found
    arguments.results.write_text(json.dumps(list(results.values()), indent=2) + "\n")


if __name__ == "__main__":
    main()
