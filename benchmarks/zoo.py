"""The whole way on the architectures of pytorchcv, in the order of ARCHITECTURES, the most different first:

    python benchmarks/zoo.py [NAME ...] [--results FILE] [--limit N] [--timeout SECONDS] [--threads N]

With NAMEs such as ``transformers:resnet`` it does the same for networks of ``small_networks.py``.

One small network of every architecture, with random weights and without torchvision (``pip install --no-deps pytorchcv
requests``), is rewritten with the rule ``balanced`` from its weights alone to 0.6 of its MACs, exported, and onnxruntime
compared with torch; nothing is timed. Where that budget is out of reach, mostly because the network is
depthwise-separable as it is, every site is rewritten at the rule's own ratio. Before, every site is rewritten at full
rank, one structure here and another there, which must give the original's outputs.

Architectures run in child processes, so that a crash or a timeout of one does not end the table. ``--results`` keeps
every outcome as it comes; a later call with the same file goes on behind the last one, and does NAMEs again. The end
says how many came through, how many were refused with an error that says why, and how many crashed or came out wrong,
which is a defect.
"""

import argparse
import copy
import importlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from children import Failure, guarded
from small_networks import SMALL
from tabulate import tabulate
from torch import Tensor, nn

import convrewrite
from convrewrite.calibration import Calibration, evaluation_inputs
from convrewrite.conv import Cost
from convrewrite.errors import ConvRewriteError, ExportError, PlanError, TraceError
from convrewrite.graph import find
from convrewrite.modules import named_outputs
from convrewrite.onnx_graph import kept_sites, refused_sites
from convrewrite.progress import Stopwatch, silent
from convrewrite.reporting import Report
from convrewrite.rewriting import Prepared, Work, rewrite, settle
from convrewrite.rules import SearchSpace, Shortlist, resolve, search_spaces
from convrewrite.runtime import export, measure_fidelity, require_parity
from convrewrite.settings import Settings
from convrewrite.structures import discover

SIZES = (64, 96, 128, 224, 256, 299, 480)
CHANNELS = {"superpointnet": 1, "pfpcnet": 1}
FIXED = {"pfpcnet": (320, 240), "ntsnet_cub": (448, 448), "condensenet": (224, 224)}
"""Networks for one height and width; condensenet runs at others, but sees two channels only."""

OPTIONS = {"simplepose_coco": {"return_heatmap": True}, "simpleposemobile_coco": {"return_heatmap": True}}
"""These leave out the loop over numbers in tensors that looks for maxima: with it not even the original has an ONNX form."""
WITHOUT = "without ONNX"
RULE = "balanced"
BUDGET = {"macs": 0.6}
MEMORY = 1 << 30
EXACT = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The greatest relative error of a deep network that is rewritten at full rank: rounding, layer after layer."""


@dataclass(frozen=True)
class Outcome:
    """What became of one network. ``end``: "through", "without ONNX" (rewritten, but neither it nor the original can be
    exported), "refused", "wrong", "crashed" or "timeout"; ``message`` says why.

    ``full_rank`` is the relative error of outputs at full rank, ``parity`` that of onnxruntime; ``macs`` is the part left,
    ``seconds`` are those of the processor.
    """

    end: str
    message: str = ""
    size: int = 0
    sites: int = 0
    rewritten: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    macs: float | None = None
    full_rank: float | None = None
    parity: float | None = None
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)


def network(module: str) -> tuple[nn.Module, Tensor]:
    """The network and the least input of SIZES (32 x 32 for those of CIFAR) that it takes."""
    if module in SMALL:
        torch.manual_seed(0)
        return settled(SMALL[module].build().eval()), torch.randn(1, *SMALL[module].shape)
    name = ARCHITECTURES.get(module, module)
    build = builder(module)
    squares = [(size, size) for size in ((32,) if "cifar" in name else SIZES)]
    problem = "no size tried"
    for size in [FIXED[module]] if module in FIXED else squares:
        torch.manual_seed(0)
        image = torch.randn(1, CHANNELS.get(module, 3), *size)
        try:
            model = settled(sized(partial(build, **OPTIONS.get(module, {})), size).eval())
            with torch.no_grad():
                model(image)
        except (RuntimeError, AssertionError, ValueError) as error:
            problem = f"{size[0]} x {size[1]}: {error}"
            continue
        return model, image
    raise LookupError(f"{name} takes none of the sizes tried; {problem}")


def builder(module: str) -> Callable[..., nn.Module]:
    """What builds a network of pytorchcv, or with ``timm:NAME`` one of timm."""
    library, _, name = module.rpartition(":")
    if library:
        return partial(importlib.import_module(library).create_model, name)
    return getattr(importlib.import_module(f"pytorchcv.models.{module}"), ARCHITECTURES[module])


def sized(build: Callable[..., nn.Module], size: tuple[int, int]) -> nn.Module:
    """Built for this input size where the size is part of the network."""
    try:
        return build(pretrained=False, in_size=size)
    except TypeError:
        return build(pretrained=False)


def settled(model: nn.Module) -> nn.Module:
    """The model with BatchNorms that do something, as after training, and without constant weights or indices: otherwise errors
    might not show."""
    with torch.no_grad():
        for module in model.modules():
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.1)
        for weight in model.parameters():
            if weight.ndim >= 2 and weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
                nn.init.normal_(weight, std=0.1)
    choose_channels(model)
    return model


def choose_channels(model: nn.Module) -> None:
    """Give condensenet the indices that it would learn: before, all that is picked is the first channel."""
    for part in model.modules():
        index = getattr(part, "index", None)
        if isinstance(index, Tensor):
            span = len(index) * (2 if hasattr(part, "linear") else 1)
            index.copy_(torch.randperm(span)[: len(index)])


def attempt(module: str) -> Outcome:
    """At full rank, then at the budget."""
    model, image = network(module)
    size = image.shape[-1]
    try:
        require_hearing(model, image)
        exact, tolerance = at_full_rank(model, image)
        if not exact <= tolerance:
            return Outcome("wrong", f"at full rank outputs differ by {exact:.2g}", size, full_rank=exact)
        report, parity, message = at_the_budget(model, image)
    except ConvRewriteError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}", size)
    kept = Counter(row.reason or "" for row in report.sites if row.action == "kept")
    rewritten = len(report.sites) - kept.total()
    macs, stages = report.totals.macs.ratio, report.seconds
    end = "through" if parity is not None else WITHOUT
    return Outcome(end, message, size, len(report.sites), rewritten, dict(kept), macs, exact, parity, stages=stages)


def require_hearing(model: nn.Module, image: Tensor) -> None:
    """Raise LookupError for outputs that do not depend on the image, or on kernels: they are equal whatever becomes of
    convolutions."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for conv in (part for part in other.modules() if isinstance(part, nn.Conv1d | nn.Conv2d)):
            conv.weight.mul_(1.5)
        first = named_outputs(model(image.clone()))
        for name, changed in (("input", model(image.flip(-1))), ("kernels", other(image.clone()))):
            second = named_outputs(changed)
            if all(torch.equal(first[key], second[key]) for key in first):
                raise LookupError(f"the network's outputs do not depend on its {name}; nothing would be shown")


def at_full_rank(model: nn.Module, image: Tensor) -> tuple[float, float]:
    """The relative error of outputs once every site is rewritten exactly, and what rounding explains of it.

    In float64, where the network's forward makes no float32 of its own.
    """
    doubled = copy.deepcopy(model).double()
    try:
        return full_rank_error(doubled, image.double()), EXACT[torch.float64]
    except TraceError:
        return full_rank_error(model, image), EXACT[torch.float32]


def full_rank_error(model: nn.Module, image: Tensor) -> float:
    exact, _ = at_exact_ranks(model, (image,), without_inputs(image))
    return max(row.relative_error for row in measure_fidelity(model, exact, [(image,)]).outputs)


def at_exact_ranks(model: nn.Module, inputs: tuple[Tensor, ...], data: Calibration) -> tuple[nn.Module, int]:
    """The model with every site rewritten at full rank, one structure here and another there; and how many these are."""
    known, rules = discover(), resolve([RULE])
    lifted, traced, sites = find(model, inputs, kept_sites(model), refused_sites(model))
    spaces = search_spaces(sites, rules, known)
    prepared = Prepared(model, lifted, inputs, traced, sites, Cost(), tuple(rules), known, spaces)
    shortlists = [exact_shortlist(space, index) for index, space in enumerate(prepared.search_spaces)]
    evaluation = evaluation_inputs(prepared.inputs, data)
    found = rewrite(Work(prepared, data, evaluation, {}, Settings(memory=MEMORY), silent, Stopwatch()), shortlists)
    changed = [outcome.site for outcome in found.outcomes if outcome.candidate is not None]
    return settle(model, prepared.lifted, found.model, changed).model, len(changed)


def exact_shortlist(space: SearchSpace, index: int) -> Shortlist:
    """One structure at full rank, another one at the next site."""
    if not space.rank_ranges:
        return Shortlist(space.site, (), space.reason)
    rank_range = space.rank_ranges[index % len(space.rank_ranges)]
    return Shortlist(space.site, (rank_range.at(rank_range.ranks[-1]),))


def without_inputs(image: Tensor) -> Calibration:
    """From the weights alone; effects are measured on two images of noise, since more would take the longest of all."""
    noise = torch.randn(2, *image.shape[1:], generator=torch.Generator().manual_seed(0)).to(image.dtype)
    return Calibration((), ((noise,),), "weights only", "none")


def at_the_budget(model: nn.Module, image: Tensor) -> tuple[Report, float | None, str]:
    """The report, the greatest relative error of onnxruntime's outputs against torch's (None where the original has no
    ONNX form either), and why the budget was missed or there is none."""
    missed = ""
    options: dict[str, Any] = {"calibration": without_inputs(image), "fast": True, "measure": False}
    try:
        result = convrewrite.optimize(model, image, [RULE], budget=BUDGET, **options)
    except PlanError as error:
        missed = str(error)
        result = convrewrite.optimize(model, image, [RULE], **options)
    try:
        return result.report, parity_of(result.model, image), missed
    except ExportError as error:
        if has_form(model, image):
            raise
        return result.report, None, f"the original has no ONNX form either: {error}"


def has_form(model: nn.Module, image: Tensor) -> bool:
    """Whether a network can be exported."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(model, image, Path(folder) / "model.onnx")
        except ExportError:
            return False
    return True


def parity_of(model: nn.Module, image: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        exported = export(model, image, Path(folder) / "model.onnx")
        parity = convrewrite.verify(model, exported.path, image).parity
    require_parity(parity)
    return max(output.relative_error for output in parity.outputs)


def guarded_attempt(module: str, timeout: float) -> Outcome:
    """The outcome in a child process."""
    done = guarded(partial(attempt, module), timeout)
    outcome = Outcome(done.found.end, done.found.message) if isinstance(done.found, Failure) else done.found
    return replace(outcome, seconds=done.seconds)


def known(path: Path | None) -> dict[str, Outcome]:
    """The last outcome of every architecture in the file."""
    if path is None or not path.exists():
        return {}
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {entry.pop("module"): Outcome(**entry) for entry in entries}


def keep(path: Path | None, module: str, outcome: Outcome) -> None:
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"module": module, **asdict(outcome)}) + "\n")


def tell(outcomes: Mapping[str, Outcome]) -> None:
    """The table, the messages, why sites are kept, and the counts."""
    headers = [
        "network",
        "input",
        "sites",
        "rewritten",
        "MACs",
        "full rank",
        "parity",
        "end",
        "seconds",
        "kept, or why not",
    ]
    table = tabulate(
        [row(module, outcome) for module, outcome in outcomes.items()],
        headers,
        maxcolwidths=[*[None] * (len(headers) - 1), 60],
        disable_numparse=True,
    )
    print(table)
    for module, outcome in outcomes.items():
        if outcome.message:
            print(f"{module}: {outcome.end}: {outcome.message}")
    reasons = sum((Counter(outcome.kept) for outcome in outcomes.values()), Counter())
    print(tabulate(reasons.most_common(), ["sites", "kept, because"]))
    ends = Counter(outcome.end for outcome in outcomes.values())
    missed = sum(outcome.end == "through" and bool(outcome.message) for outcome in outcomes.values())
    print(
        f"{len(outcomes)} architectures: {ends['through']} came through ({missed} of them where the budget is out of reach), "
        f"{ends[WITHOUT]} did without an ONNX form, {ends['refused']} ended in a clear error, {ends['wrong']} came out wrong, "
        f"{ends['crashed']} crashed, {ends['timeout']} took too long"
    )


def row(module: str, outcome: Outcome) -> list[object]:
    kept = "\n".join(f"{count}x {reason}" for reason, count in Counter(outcome.kept).most_common())
    errors = ["" if error is None else f"{error:.0e}" for error in (outcome.full_rank, outcome.parity)]
    macs = "" if outcome.macs is None else f"{outcome.macs:.2f}"
    done = outcome.end in ("through", WITHOUT)
    counts = [outcome.sites, outcome.rewritten] if done else ["", ""]
    why = kept if done else outcome.message.partition("\n")[0]
    return [
        ARCHITECTURES.get(module, module),
        outcome.size or "",
        *counts,
        macs,
        *errors,
        outcome.end,
        f"{outcome.seconds:.0f}",
        why,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="modules of pytorchcv.models, timm:NAME, transformers:NAME or diffusers:NAME; none: all of pytorchcv",
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="what is there is not done again, unless named")
    parser.add_argument("--limit", type=int, help="only so many, the most different first")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per architecture")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    known_names = (*ARCHITECTURES, *SMALL)
    unknown = [name for name in arguments.names if name not in known_names and not name.startswith("timm:")]
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}; known are {', '.join(known_names)}")
    torch.set_num_threads(arguments.threads)
    parity_of(
        nn.Conv2d(1, 1, 1).eval(), torch.zeros(1, 1, 2, 2)
    )  # so that the exporter is imported once, not in every child
    before = {} if arguments.names else known(arguments.results)
    for module in (arguments.names or list(ARCHITECTURES))[: arguments.limit]:
        if module in before:
            continue
        outcome = guarded_attempt(module, arguments.timeout)
        keep(arguments.results, module, outcome)
        before[module] = outcome
        counts = f"{outcome.rewritten} of {outcome.sites} sites, full rank {outcome.full_rank}, parity {outcome.parity}"
        print(f"{module}: {outcome.end}, {counts}, {outcome.seconds:.0f} s; {outcome.message[:300]}", flush=True)
    tell(before)


if __name__ == "__main__":
    main()
