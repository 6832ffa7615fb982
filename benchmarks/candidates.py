"""What the structure `smaller` wins where it competes: ``python benchmarks/candidates.py --network example --seed 1``.

One survey of the rule ``balanced`` with `smaller` is made for budgets of MACs, and another, with times, for budgets of latency.
Plans are then chosen from all options, and from all but those of `smaller`, fitted to the 1,024 unlabelled images of the
example, and compared by KL on those of them that are held out. Test images and labels are not looked at.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from few_inputs import calibration_images
from tabulate import tabulate
from torch import nn
from training import load

from convrewrite.meanings import effect_of
from convrewrite.modules import named_outputs, private_copy, run
from convrewrite.pipeline.prepare import prepare
from convrewrite.pipeline.run import Run
from convrewrite.planning.choice import latency_table_of
from convrewrite.planning.curves import Surveyed
from convrewrite.planning.latency_budget import measured_part
from convrewrite.planning.sensitivities import THOROUGH, survey
from convrewrite.process import at_work
from convrewrite.progress import Stopwatch, silent
from convrewrite.rules import Rule, resolve
from convrewrite.settings import Settings

RESULTS = Path(__file__).parent / "results" / "candidates.json"
NEW = "smaller"
TIMINGS = 3
"""Times that a plan as a whole is timed: the median is told."""


@dataclass(frozen=True)
class Row:
    """One plan: the part of a resource asked for, what it left, its sites that have the new structure, and the harm it does."""

    network: str
    seed: int
    resource: str
    asked: float
    with_new: bool
    left: float
    macs_left: float
    sites: int
    new_sites: int
    predicted: float
    held_out_kl: float


def rules_with(name: str) -> list[Rule]:
    """The rule ``balanced`` with one more structure."""
    return [
        rule if name in rule.structures else rule.model_copy(update={"structures": (*rule.structures, name)})
        for rule in resolve(["balanced"])
    ]


def begin(network: str, seed: int, rules: Sequence[Rule]) -> Run:
    """A run up to its survey, with the original exported and timed."""
    model, images = load(network, seed), calibration_images()
    inputs = (images[:1],)
    prepared = prepare(private_copy(model, inputs), inputs, rules, (), model)
    settings = Settings(budget={"latency": 0.5})
    return Run.begin(prepared, images, settings.constraints, settings, silent, Stopwatch())


def surveyed(started: Run, timed: bool) -> tuple[Surveyed, ...]:
    """All options of all sites, with their seconds where these are asked for."""
    table = latency_table_of(started.work.prepared, started.work.settings) if timed else None
    return survey(started.work, effort=THOROUGH, latency_table=table)


def without(options: Sequence[Surveyed], name: str) -> tuple[Surveyed, ...]:
    """What was surveyed but for one structure."""
    return tuple(
        replace(entry, options=tuple(o for o in entry.options if o.candidate.option.structure != name))
        for entry in options
    )


def held_out_kl(started: Run, model: nn.Module) -> float:
    """KL in nats from the original's classes to the rewritten model's, on all held-out calibration images."""
    original = started.work.prepared.model
    batches = started.work.data.held_out
    pairs = [(named_outputs(run(original, batch)), named_outputs(run(model, batch))) for batch in batches]
    return effect_of(pairs, started.work.evaluation.meanings)


class Study:
    """One network, and the plans that are made for it."""

    def __init__(self, network: str, seed: int) -> None:
        self.network, self.seed = network, seed
        self.started = begin(network, seed, rules_with(NEW))

    def row(self, options: tuple[Surveyed, ...], resource: str, part: float, with_new: bool) -> Row:
        """The plan for one budget, fitted as a run fits it."""
        started, work = self.started, self.started.work
        planner = replace(started.planner, constraints=replace(started.planner.constraints, budget={resource: part}))
        chosen = planner.choose_from(options if with_new else without(options, NEW))
        rewritten, allocation = planner.fit(chosen)
        assert allocation is not None
        structures = [o.candidate.option.structure for o in allocation.chosen if o is not None]
        left = allocation.part("macs")
        if resource == "latency":
            assert started.baseline is not None
            times = [measured_part(work.prepared, allocation.shortlists(), started.baseline) for _ in range(TIMINGS)]
            left = statistics.median(times)
        return Row(
            self.network, self.seed, resource, part, with_new, left, allocation.part("macs"), len(structures),
            structures.count(NEW), allocation.effect, held_out_kl(started, rewritten.model),
        )  # fmt: skip


def dump(options: Sequence[Surveyed], path: Path) -> None:
    """Every option with its costs and effect, to hold against those of candidates that are no structure."""
    rows = [
        {"site": entry.site.name, "structure": o.candidate.option.structure, "option": o.candidate.option.describe(),
         "macs": o.candidate.cost.macs, "seconds": getattr(o, "seconds", None), "effect": o.effect,
         "site_macs": entry.site.cost.macs, "site_seconds": entry.seconds}
        for entry in options
        for o in entry.options
    ]  # fmt: skip
    path.write_text(json.dumps(rows))


def study(network: str, seed: int, budgets: Mapping[str, Sequence[float]], options_to: Path | None) -> list[Row]:
    """The rows of one network, told as they come."""
    rows: list[Row] = []
    it = Study(network, seed)
    for resource, parts in budgets.items():
        if not parts:
            continue
        begun = time.process_time()
        options = surveyed(it.started, timed=resource == "latency")
        print(f"{network} {seed}: survey for {resource}: {time.process_time() - begun:.0f} s of processor", flush=True)
        if options_to is not None:
            dump(options, options_to / f"{network}-{seed}-{resource}.json")
        for part in parts:
            for with_new in (False, True):
                rows.append(it.row(options, resource, part, with_new))
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["example", "vgg"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--macs", type=float, nargs="*", default=[0.25, 0.15])
    parser.add_argument("--latency", type=float, nargs="*", default=[0.6, 0.4])
    parser.add_argument("--options-to", type=Path, help="a folder for all options with their effects")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with at_work(0):
        for network in arguments.network:
            budgets = {"macs": arguments.macs, "latency": arguments.latency}
            rows += study(network, arguments.seed, budgets, arguments.options_to)
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    arguments.results.write_text(json.dumps({**known, NEW: [asdict(row) for row in rows]}, indent=2) + "\n")
    print(tabulate([asdict(row) for row in rows], headers="keys", floatfmt=".4g"))


if __name__ == "__main__":
    main()
