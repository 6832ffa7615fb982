"""The whole way, stage after stage: prepare, calibrate, plan, fit and apply, export, verify, report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import fx, nn

from convrewrite.errors import PlanError, UsageError
from convrewrite.graph import find
from convrewrite.inputs import ExampleInput, bound_inputs
from convrewrite.meanings import WantedOutputs, asked_meanings
from convrewrite.modules import private_copy, surroundings_preserved
from convrewrite.pipeline.prepare import prepare
from convrewrite.pipeline.results import Result
from convrewrite.pipeline.run import Run
from convrewrite.planning import Choice, Constraints, Keep, Plan, check_budget, keep_of, shortlists_of
from convrewrite.process import at_work
from convrewrite.progress import Progress, Stopwatch, silent
from convrewrite.reporting import AnalysisRow
from convrewrite.rewriting import Settings
from convrewrite.rules import Rule, RuleFile, refusal, require_structures, resolve, subjects
from convrewrite.structures import Structure, discover

RuleSource = str | Path | Rule | RuleFile


KeepSource = float | Mapping[str, float] | Keep | None


MEMORY = 4 << 30
"""Bytes of activations and moments held at once, unless the caller says otherwise."""


def optimize(
    model: nn.Module,
    example_input: ExampleInput,
    rules: Sequence[RuleSource] = ("separable",),
    calibration: object = None,
    budget: Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    keep: KeepSource = None,
    fast: bool = False,
    threads: int = 1,
    memory: int = MEMORY,
    structures: Sequence[Structure] = (),
    output_weighting: bool = True,
    outputs: WantedOutputs | None = None,
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
        budget: parts of the whole model that may be left, ``{"macs": 0.5}``, ``"params"`` or ``"latency"`` (measured in
            onnxruntime), alone or together: at every site the option is chosen whose *measured* effect on the outputs
            adds up to the least. None: each rule's own ratio.
        seed: of everything random; with the same inputs, seed and thread count the result is byte-equal.
        keep: instead of a budget, the most saving of MACs whose measured agreement of the top class stays at this share,
            as 0.98, or whose relative output error stays below ``{"error": 0.02}``. With a budget: a limit on its result.
        fast: measure less while planning.
        threads: at which latency is measured.
        memory: bytes that activations, covariances and gathered positions may take together; activations beyond it wait on
            disk. One batch at work, the model and Python itself come on top. A limit that the largest site exceeds alone
            is refused.
        structures: further structures that rules may name, besides the discovered ones.
        output_weighting: weigh the errors of a site's output channels by what the model's outputs feel of them, which
            takes gradients of the original model. False: all count alike.
        outputs: what outputs mean, by name, where it is not as it is told from the model and its values: ``"logits"``,
            ``"probabilities"`` (that sum to one), ``"multilabel"`` (independent probabilities), ``"embedding"`` (only its
            direction counts), ``"values"`` or ``"ignore"``; or a pair of that and a weight among several outputs.
        measure: False leaves out export, parity and latency.

    Raises:
        UsageError, ModelError or VerificationError, each saying what to do (see :mod:`convrewrite.errors`).
    """
    settings = Settings(seed, threads, memory, output_weighting, measure, fast)
    constraints = _asked(budget, keep, outputs, settings)
    chosen, inputs = resolve(rules), bound_inputs(model, example_input)
    with at_work(seed), surroundings_preserved(model):
        watch = Stopwatch()
        with watch.timed("find sites"):
            prepared = prepare(private_copy(model, inputs), inputs, chosen, structures, model)
        run = Run.begin(prepared, calibration, constraints, settings, progress or silent, watch)
        return run.finish(run.planner.choose(), name or type(model).__name__, notes)


def plan(
    model: nn.Module,
    example_input: ExampleInput,
    rules: Sequence[RuleSource] = ("balanced",),
    calibration: object = None,
    budget: Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    keep: KeepSource = None,
    fast: bool = False,
    threads: int = 1,
    memory: int = MEMORY,
    structures: Sequence[Structure] = (),
    output_weighting: bool = True,
    outputs: WantedOutputs | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Only choose: one option per site, as a value for :func:`apply`. The arguments are those of :func:`optimize`;
    ``measure=False`` leaves out the times of options."""
    settings = Settings(seed, threads, memory, output_weighting, measure, fast)
    constraints = _asked(budget, keep, outputs, settings)
    chosen, inputs = resolve(rules), bound_inputs(model, example_input)
    with at_work(seed), surroundings_preserved(model):
        prepared = prepare(private_copy(model, inputs), inputs, chosen, structures, model)
        run = Run.begin(prepared, calibration, constraints, settings, progress or silent, Stopwatch())
        with run.scratch:
            return run.plan()


def apply(
    model: nn.Module,
    example_input: ExampleInput,
    plan: Plan,
    calibration: object = None,
    *,
    threads: int = 1,
    memory: int = MEMORY,
    structures: Sequence[Structure] = (),
    output_weighting: bool = True,
    outputs: WantedOutputs | None = None,
    measure: bool = True,
    name: str | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Result:
    """Carry out a plan on the model it was made for: fit its options to the calibration inputs, apply, verify, report.

    Raises PlanError when the plan belongs to another model, or to other weights; the other arguments and errors are those
    of :func:`optimize`.
    """
    settings = Settings(plan.seed, threads, memory, output_weighting, measure)
    inputs = bound_inputs(model, example_input)
    constraints = replace(plan.asked(), outputs=asked_meanings(outputs))
    plan.require_model(model, weights=True)
    with at_work(plan.seed), surroundings_preserved(model):
        watch = Stopwatch()
        with watch.timed("find sites"):
            prepared = prepare(private_copy(model, inputs), inputs, (), structures, model)
            shortlists = shortlists_of(plan, prepared)
        run = Run.begin(prepared, calibration, constraints, settings, progress or silent, watch, plan.meanings())
        return run.finish(Choice(shortlists), name or type(model).__name__, notes, plan)


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

    inputs = bound_inputs(model, example_input)
    known = discover() | {structure.name: structure for structure in structures}
    chosen = resolve(list(builtin_rules()) if rules is None else rules)
    require_structures(chosen, known)
    with at_work(0), surroundings_preserved(model):
        _, _, sites = find(private_copy(model, inputs), inputs)
    seen = subjects(sites)
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

    Its fields are the options, as in :func:`optimize`; nothing is exported or timed unless ``measure`` says so.
    """

    example_input: ExampleInput
    rules: Sequence[RuleSource] = ("separable",)
    calibration: object = None
    budget: Mapping[str, float] | None = None
    seed: int = 0
    structures: Sequence[Structure] = ()
    keep: KeepSource = None
    outputs: WantedOutputs | None = None
    fast: bool = False
    threads: int = 1
    memory: int = MEMORY
    output_weighting: bool = True
    measure: bool = False
    name: str | None = None
    notes: Sequence[str] = ()
    progress: Progress | None = None

    def __call__(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """A rewritten copy of the graph module. Raises UsageError for a module that is none, and what :func:`optimize` raises."""
        if not isinstance(graph_module, fx.GraphModule):
            raise UsageError(
                f"RewriteConvolutions: expected a torch.fx.GraphModule, found {type(graph_module).__name__}; give it "
                "torch.fx.symbolic_trace(model), or use convrewrite.optimize(model, ...), which takes any module"
            )
        result = optimize(graph_module, **{field.name: getattr(self, field.name) for field in fields(self)})
        assert isinstance(result.model, fx.GraphModule)
        result.model.recompile()
        return result.model


def _asked(
    budget: Mapping[str, float] | None, keep: KeepSource, outputs: WantedOutputs | None, settings: Settings
) -> Constraints:
    constraints = Constraints(dict(budget or {}), keep_of(keep), asked_meanings(outputs))
    check_budget(constraints.budget)
    if "latency" in constraints.budget and not settings.measure:
        raise PlanError(
            "budget latency: needs measured times; leave out --no-onnx (in Python measure=False), or ask for macs or params"
        )
    return constraints
