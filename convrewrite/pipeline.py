"""The whole way, stage after stage: trace, find sites, propose, calibrate, fit and apply, export, verify, report."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from convrewrite import storing
from convrewrite.calibration import Calibration, read_calibration
from convrewrite.conv import Cost
from convrewrite.errors import ExportError, TraceError
from convrewrite.exporting import export
from convrewrite.gating import fast_enough
from convrewrite.inputs import ExampleInput, Inputs, bind_inputs, parameter_names, require_common_batch
from convrewrite.latency import compare_onnx, compare_torch
from convrewrite.loading import import_object
from convrewrite.outputs import eval_mode
from convrewrite.planning import Fingerprint, Plan, PlannedOption, PlannedSite, check_budget, offers_within
from convrewrite.proposing import candidates, menus, refusal
from convrewrite.reporting.building import Measured, build_report, tool_version
from convrewrite.reporting.model import AnalysisRow, Report
from convrewrite.rewriting import Outcome, Progress, rewrite
from convrewrite.rules import Rule, RuleFile, resolve
from convrewrite.sites import Site, find_sites
from convrewrite.stopwatch import Stopwatch
from convrewrite.structure import Structure
from convrewrite.structures import discover
from convrewrite.synthetic import synthesise
from convrewrite.tracing import Traced, run, trace
from convrewrite.verifying import check_parity, measure_fidelity, require_parity
from convrewrite.weighting import output_weights

RuleSource = str | Path | Rule | RuleFile
MEMORY = 4 << 30
"""Bytes of activations held at once, unless the caller says otherwise."""

NOISE_EXAMPLES = 64


@dataclass(frozen=True, slots=True)
class Result:
    """The rewritten model, the plan it followed, and the report."""

    model: nn.Module
    plan: Plan
    report: Report
    _onnx: Path | None = field(repr=False)
    _folder: "_Scratch" = field(repr=False)

    def save(self, folder: str | Path) -> Path:
        """Write model.pt, model.onnx, plan.json, weights.safetensors, report.json, report.md and report.html.

        They are written aside and renamed together. Raises UsageError when the folder cannot be written or holds
        other things.
        """
        return storing.save(Path(folder), self.model, self.plan, self.report, self._onnx)


class _Scratch:
    """A folder that lasts as long as this object; a TemporaryDirectory would warn when it is collected."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="convrewrite-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def optimize(
    model: nn.Module,
    example_input: ExampleInput,
    rules: Sequence[RuleSource] = ("separable",),
    calibration: object = None,
    budget: Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    threads: int = 1,
    memory: int = MEMORY,
    structures: Sequence[Structure] = (),
    output_weighting: bool = True,
    measure: bool = True,
    name: str | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Result:
    """Rewrite a trained model into a smaller one that computes nearly the same. The model itself is not touched.

    Args:
        model: any module with convolutions; it is used in eval mode.
        example_input: one input ``(N, C, H, W)``, a tuple of positional inputs, a dictionary by the names of ``forward``'s
            parameters, or ``(args, kwargs)``.
        rules: names of built-in rules, paths of rule files, or Rule objects; several compete at each site.
        calibration: real inputs, in any form that :func:`convrewrite.calibration.read_calibration` takes, or a
            Calibration. None: inputs are synthesised from BatchNorm statistics, where there are any. "weights": no
            inputs, the stages are decomposed from the weights alone.
        budget: parts of the whole model's cost, ``{"macs": 0.5}`` or ``{"params": 0.5}``; None: each rule's own ratio.
        seed: of everything random; with the same inputs, seed and thread count the result is byte-equal.
        threads: at which latency is measured.
        memory: bytes of activations held at once; what is more waits on disk.
        structures: further structures that rules may name, besides the discovered ones.
        output_weighting: weigh the errors of a site's output channels by what the model's outputs feel of them, which
            takes gradients of the original model. False: all count alike.
        measure: False leaves out export, parity and latency.

    Raises:
        UsageError, ModelError or VerificationError, each saying what to do (see :mod:`convrewrite.errors`).
    """
    report_progress = progress or _silent
    inputs = _inputs(model, example_input)
    asked = dict(budget or {})
    check_budget(asked)
    chosen = resolve(rules)
    known = discover() | {structure.name: structure for structure in structures}
    if measure:
        _require_runtime_dtype(model)
    stages = Stopwatch()
    with eval_mode(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        with stages.timed("find sites"):
            traced, sites = _find(model, inputs)
            totals = whole_cost(model, inputs, sites)
            offers = offers_within(menus(sites, chosen, known), asked, totals)
            offers = fast_enough(offers, known, threads)
        with stages.timed("calibrate"):
            data = _calibrate(model, inputs, calibration, seed, report_progress)
        with stages.timed("output weights"):
            active = [offer.site for offer in offers if offer.proposals]
            weights = output_weights(model, active, data.fit, seed) if output_weighting else {}
        rewritten = rewrite(
            model, traced, offers, data, known, seed=seed, memory=memory, weights=weights, progress=report_progress,
            stopwatch=stages,
        )  # fmt: skip
        plan = _plan(model, [rule.name for rule in chosen], asked, seed, rewritten.outcomes)
        folder = _Scratch()
        with stages.timed("verify"):
            measured, onnx, more = _measure(
                model, rewritten.model, inputs, data, folder.path, threads, measure, report_progress
            )
    after = _cost_after(totals, rewritten.outcomes)
    report = build_report(
        model=name or type(model).__name__,
        input_shapes=[tuple(tensor.shape) for tensor in inputs],
        plan=plan,
        threads=threads,
        calibration=data,
        outcomes=rewritten.outcomes,
        costs=(totals, after),
        measured=measured,
        notes=[*notes, *data.notes, *_lost(traced), *more, *_nothing_done(rewritten.outcomes)],
        seconds=stages.seconds,
    )
    return Result(rewritten.model, plan, report, onnx, folder)


def analyze(
    model: nn.Module,
    example_input: ExampleInput,
    rules: Sequence[RuleSource] | None = None,
    structures: Sequence[Structure] = (),
) -> tuple[AnalysisRow, ...]:
    """Every site with its kind, geometry, cost and share of the MACs, and which rules take it or why not.

    ``rules`` None: all built-in ones.
    """
    from convrewrite.rules import builtin_rules

    inputs = _inputs(model, example_input)
    known = discover() | {structure.name: structure for structure in structures}
    chosen = resolve(list(builtin_rules()) if rules is None else rules)
    with eval_mode(model):
        _, sites = _find(model, inputs)
    seen = candidates(sites)
    total = sum(site.cost.macs for site in sites) or 1
    return tuple(
        AnalysisRow(
            name=site.name,
            kind=site.kind,
            geometry=site.spec.describe(),
            calls=max(1, len(site.input_sizes)),
            parameters=site.cost.parameters,
            macs=site.cost.macs,
            mac_share=site.cost.macs / total,
            applies={rule.name: refusal(site, seen[site.name], rule, known) or "yes" for rule in chosen},
        )
        for site in sites
    )


@dataclass(frozen=True, slots=True)
class RewriteConvolutions:
    """:func:`optimize` as a torch.fx pass: GraphModule in, GraphModule out, the input untouched.

    Its fields are the options, as in :func:`optimize`; nothing is exported or timed.
    """

    example_input: ExampleInput
    rules: Sequence[RuleSource] = ("separable",)
    calibration: object = None
    budget: Mapping[str, float] | None = None
    seed: int = 0
    structures: Sequence[Structure] = ()

    def __call__(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """A rewritten copy of the graph module."""
        result = optimize(
            graph_module, self.example_input, self.rules, self.calibration, self.budget, self.seed,
            structures=self.structures, measure=False,
        )  # fmt: skip
        assert isinstance(result.model, fx.GraphModule)
        result.model.recompile()
        return result.model


def _require_runtime_dtype(model: nn.Module) -> None:
    """Raise ExportError for what onnxruntime cannot run: before the long work, not after it."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float64, torch.bfloat16):
            raise ExportError(
                f"{type(model).__name__}: expected float32 weights, found {name} in {str(parameter.dtype)[6:]}, for which "
                "onnxruntime has no convolution; convert the model with model.float(), or leave out export and "
                "measurement (measure=False in Python)"
            )


def whole_cost(model: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> Cost:
    """Parameters of the whole model; MACs of its convolutions and linear layers for one example."""
    linear = _linear_macs(model, inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, linear + sum(site.cost.macs for site in sites))


def _linear_macs(model: nn.Module, inputs: Inputs) -> int:
    total = 0

    def count(module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Linear)
        total += output.numel() * module.in_features

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total // max(1, inputs[0].shape[0])


def _inputs(model: nn.Module, example_input: ExampleInput) -> Inputs:
    inputs = bind_inputs(model, example_input)
    require_common_batch(inputs)
    return inputs


def _silent(stage: str, done: int, total: int, text: str) -> None:
    """No progress is shown."""


def _find(model: nn.Module, inputs: Inputs) -> tuple[Traced, tuple[Site, ...]]:
    traced = trace(model, len(inputs))
    sites = find_sites(model, inputs, traced)
    if not sites:
        raise TraceError(
            f"{type(model).__name__}: the model has no two-dimensional convolution; there is nothing to rewrite"
        )
    return traced, sites


def _calibrate(model: nn.Module, inputs: Inputs, source: object, seed: int, progress: Progress) -> Calibration:
    if isinstance(source, Calibration):
        return source
    if source is None:
        made = synthesise(model, inputs, seed=seed, on_step=_steps(progress))
        if made is not None:
            return made
        why = "takes several inputs" if len(inputs) > 1 else "has no BatchNorm statistics to make any from"
        loud = f"no calibration inputs were given and the model {why}: the factors are those of the weights alone, "
        loud += "which loses far more accuracy; give real inputs (--calib)"
        return Calibration((), (), "weights only", "none", (loud,))
    if isinstance(source, str) and source == "weights":
        return Calibration((), (), "weights only", "none", ())
    names = parameter_names(model)[: len(inputs)]
    return read_calibration(source, inputs, seed=seed, import_object=import_object, names=names)


def _steps(progress: Progress) -> Callable[[int, int, float], None]:
    return lambda done, total, loss: progress("synthesise inputs", done, total, f"mismatch {loss:.3g}")


def _plan(
    model: nn.Module, rules: Sequence[str], budget: dict[str, float], seed: int, outcomes: Sequence[Outcome]
) -> Plan:
    sites = tuple(
        PlannedSite(
            name=outcome.site.name,
            kind=outcome.site.kind,
            geometry=outcome.site.spec.describe(),
            option=PlannedOption.of(outcome.proposal.option) if outcome.proposal else None,
            reason=outcome.reason if outcome.proposal is None else None,
            batch_norm=outcome.site.batch_norm if outcome.proposal else None,
        )
        for outcome in outcomes
    )
    return Plan(
        tool_version=tool_version(),
        model=Fingerprint.of(model),
        rules=tuple(rules),
        budget=budget,
        seed=seed,
        sites=sites,
    )


def _cost_after(totals: Cost, outcomes: Sequence[Outcome]) -> Cost:
    changed = [(o.site.cost, o.proposal.cost) for o in outcomes if o.proposal is not None]
    return Cost(
        totals.parameters - sum(before.parameters - after.parameters for before, after in changed),
        totals.macs - sum(before.macs - after.macs for before, after in changed),
    )


def _measure(
    original: nn.Module,
    rewritten: nn.Module,
    inputs: Inputs,
    data: Calibration,
    folder: Path,
    threads: int,
    everything: bool,
    progress: Progress,
) -> tuple[Measured, Path | None, tuple[str, ...]]:
    """Fidelity always; export, parity and latency when asked for. Raises VerificationError without parity."""
    batches, basis = _fidelity_inputs(inputs, data)
    progress("verify", 0, 5, "fidelity")
    fidelity = measure_fidelity(original, rewritten, batches)
    if not everything:
        return Measured(fidelity, basis), None, ()
    progress("verify", 1, 5, "export to ONNX")
    before = export(original, inputs, folder / "original.onnx")
    after = export(rewritten, inputs, folder / "model.onnx")
    progress("verify", 2, 5, "parity of onnxruntime with torch")
    parity = check_parity(rewritten, after.path, tuple(tensor[:8] for tensor in batches[0]))
    require_parity(parity)
    one = tuple(tensor[:1] for tensor in inputs)
    progress("verify", 3, 5, "latency in onnxruntime")
    onnx_latency = compare_onnx(before.path, after.path, one if after.dynamic_batch else inputs, threads=threads)
    progress("verify", 4, 5, "latency in torch")
    torch_latency = compare_torch(original, rewritten, one, threads=threads)
    progress("verify", 5, 5, "done")
    sizes = (before.path.stat().st_size, after.path.stat().st_size)
    notes = (after.note,) if after.note else ()
    return Measured(fidelity, basis, parity, sizes, onnx_latency, torch_latency), after.path, notes


def _fidelity_inputs(inputs: Inputs, data: Calibration) -> tuple[tuple[Inputs, ...], str]:
    """What fidelity is measured on, and the sentence that says so."""
    if data.held_out:
        kind = "calibration" if data.kind == "data" else "synthetic"
        return data.held_out, f"measured on {data.held_out_count} held-out {kind} inputs"
    if data.fit:
        return data.fit, f"measured on the {data.fitted_on} inputs that the factors were fitted on"
    noise = tuple(_noise_like(tensor) for tensor in inputs)
    return (noise,), f"measured on {NOISE_EXAMPLES} random noise inputs: says little about real ones"


def _noise_like(tensor: Tensor) -> Tensor:
    shape = (NOISE_EXAMPLES, *tensor.shape[1:])
    if tensor.is_floating_point():
        return torch.randn(shape, dtype=tensor.dtype)
    return tensor[:1].expand(shape)


def _lost(traced: Traced) -> list[str]:
    if not traced.lost:
        return []
    names = ", ".join(name or "the model itself" for name in traced.lost[:5])
    more = f" and {len(traced.lost) - 5} more" if len(traced.lost) > 5 else ""
    return [
        f"{names}{more} could not be followed as a graph: convolutions there are rewritten, "
        "but a BatchNorm that follows one is not folded into it"
    ]


def _nothing_done(outcomes: Sequence[Outcome]) -> list[str]:
    if any(outcome.proposal is not None for outcome in outcomes):
        return []
    return ["no site was rewritten; each row says why, and `convrewrite analyze` shows what other rules would take"]
