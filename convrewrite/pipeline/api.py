"""The entry points, which run all stages in turn: prepare, calibrate, plan, fit and apply, export, verify, report."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Unpack

from torch import fx

from convrewrite.errors import UsageError
from convrewrite.graph import find
from convrewrite.inputs import ExampleInput
from convrewrite.modules import private_copy, surroundings_preserved
from convrewrite.onnx_graph import kept_sites, refused_sites
from convrewrite.pipeline.keywords import (
    ApplyKeywords,
    Budget,
    Extras,
    OptimizeKeywords,
    PlanKeywords,
    RuleSource,
    asked,
    signed,
)
from convrewrite.pipeline.networks import ModelSource, at_home, network_of
from convrewrite.pipeline.prepare import prepare_copy
from convrewrite.pipeline.run import Run
from convrewrite.planning import Choice, Plan, shortlists_of
from convrewrite.process import at_work
from convrewrite.progress import Progress, Stopwatch
from convrewrite.reporting import AnalysisRow
from convrewrite.results import Analysis, Result, read_plan
from convrewrite.rules import refusal, require_structures, resolve, subjects
from convrewrite.settings import Settings
from convrewrite.structures import Structure, discover
from convrewrite.values import PROBE_SECONDS


@signed
def optimize(
    model: ModelSource,
    example_input: ExampleInput | None = None,
    rules: Sequence[RuleSource] = ("separable",),
    calibration: object = None,
    budget: Budget = None,
    seed: int | None = None,
    *,
    settings: Settings | None = None,
    **keywords: Unpack[OptimizeKeywords],
) -> Result:
    """Rewrite a trained model into a smaller one that computes nearly the same. The model itself is not touched.

    Args: model: any module with convolutions, which is used in eval mode; an ONNX file, by its path, or an ``onnx.ModelProto``;
    or any other model file that needs no factory. example_input: one input ``(N, C, H, W)``, a tuple of positional inputs, a
    dictionary by the names of ``forward``'s parameters, or ``(args, kwargs)``. Inputs of an ONNX graph that are not given are
    made as it states them. rules: names of built-in rules, paths of rule files, or Rule objects; several compete at each site.
    calibration: real inputs, in any form that :func:`convrewrite.calibration.read_calibration` takes, or a Calibration. None:
    inputs are synthesised from BatchNorm statistics, where there are any. "weights": no inputs, the stages are decomposed from
    the weights alone. budget, seed: as in :class:`convrewrite.Settings`. settings: all of :class:`convrewrite.Settings` as one
    value, instead of its fields. keywords: the other fields of :class:`convrewrite.Settings`; further ``structures`` that rules
    may name, besides the discovered ones; ``progress``, which is called with every step; ``name`` of the model, and ``notes``, in
    the report.

    Raises:
        UsageError, ModelError or VerificationError, each saying what to do (see :mod:`convrewrite.errors`).
    """
    settings, extras = asked(settings, {"budget": budget, "seed": seed}, keywords, OptimizeKeywords)
    chosen = resolve(rules)
    network = network_of(model, example_input, settings.timeout)
    model, inputs = network.model, network.inputs
    with at_work(settings.seed), surroundings_preserved(model):
        watch = Stopwatch()
        with watch.timed("find sites"):
            prepared = prepare_copy(model, inputs, chosen, extras.structures, left=settings.constraints.left)
        run = Run.begin(prepared, calibration, settings.constraints, settings, extras.listener, watch)
        return run.finish(run.choose(), extras.name or network.name, (*network.notes, *extras.notes))


@signed
def plan(
    model: ModelSource,
    example_input: ExampleInput | None = None,
    rules: Sequence[RuleSource] = ("balanced",),
    calibration: object = None,
    budget: Budget = None,
    seed: int | None = None,
    *,
    settings: Settings | None = None,
    **keywords: Unpack[PlanKeywords],
) -> Plan:
    """Only choose one option per site, and return the choice for :func:`apply`. The arguments are those of :func:`optimize`;
    ``measure=False`` leaves out the times of options. Nothing is written here: :func:`apply` writes forms, and ``int8``,
    ``export`` and ``half`` of ``settings`` do not count."""
    given, extras = asked(settings, {"budget": budget, "seed": seed}, keywords, PlanKeywords)
    settings, chosen = replace(given, int8=False, export=(), half=False), resolve(rules)
    network = network_of(model, example_input, settings.timeout)
    model, inputs = network.model, network.inputs
    with at_work(settings.seed), surroundings_preserved(model):
        run = Run.to_plan(model, inputs, chosen, calibration, settings, extras.structures, extras.listener)
        with run.scratch:
            return run.plan()


@signed
def apply(
    model: ModelSource,
    example_input: ExampleInput | None,
    plan: Plan | str | Path,
    calibration: object = None,
    *,
    settings: Settings | None = None,
    **keywords: Unpack[ApplyKeywords],
) -> Result:
    """Carry out a plan on the model it was made for: fit its options to the calibration inputs, apply, verify, report.

    ``plan`` may be the path of a file with one. Of ``settings``, those that decide what to choose do not count, as the plan has
    decided: ``budget``, ``keep``, ``exclude``, ``only``, ``seed``, ``fast``, ``int8`` and ``any_speed``. Raises PlanError when
    the plan belongs to another model, or to other weights; the other arguments and errors are those of :func:`optimize`.
    """
    given, extras = asked(settings, {}, keywords, ApplyKeywords)
    plan = _plan_of(plan)
    settings = replace(given, budget=None, keep=None, exclude=(), only=(), seed=plan.seed, fast=False, int8=False)
    network = network_of(model, example_input, settings.timeout)
    model, inputs = network.model, network.inputs
    constraints = replace(plan.asked(), outputs=settings.constraints.outputs)
    plan.require_model(model, weights=True)
    with at_work(plan.seed), surroundings_preserved(model):
        watch = Stopwatch()
        with watch.timed("find sites"):
            prepared = prepare_copy(model, inputs, (), extras.structures)
            shortlists = shortlists_of(plan, prepared)
        run = Run.begin(prepared, calibration, constraints, settings, extras.listener, watch, plan.meanings())
        return run.finish(Choice(shortlists), extras.name or network.name, (*network.notes, *extras.notes), plan)


def _plan_of(plan: Plan | str | Path) -> Plan:
    """The plan, which may be in a file. Raises PlanError for a file without one, UsageError for anything else."""
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | Path):
        raise UsageError(f"plan: expected a Plan, or the path of a file with one, found {type(plan).__name__}")
    return read_plan(Path(plan))


def analyze(
    model: ModelSource,
    example_input: ExampleInput | None = None,
    rules: Sequence[RuleSource] | None = None,
    structures: Sequence[Structure] = (),
    *,
    timeout: float = PROBE_SECONDS,
) -> Analysis:
    """Every site with its kind, geometry, cost and share of all convolutions' MACs, and for each rule whether it takes the
    site, or why not.

    ``rules`` None: all built-in ones. ``timeout`` is as in :class:`convrewrite.Settings`.
    """
    from convrewrite.rules import builtin_rules

    network = at_home(network_of(model, example_input, timeout))
    model, inputs = network.model, network.inputs
    known = discover() | {structure.name: structure for structure in Extras(structures).structures}
    named = list(builtin_rules()) if rules is None else rules
    chosen = resolve(named) if named else ()
    require_structures(chosen, known)
    with at_work(0), surroundings_preserved(model):
        _, _, sites = find(private_copy(model, inputs), inputs, kept_sites(model), refused_sites(model))
    seen = subjects(sites)
    total = sum(site.cost.macs for site in sites) or 1
    rows = (
        AnalysisRow(
            name=site.name,
            kind=site.kind,
            geometry=site.spec.describe(),
            calls=site.calls,
            parameters=site.cost.parameters,
            macs=site.cost.macs,
            mac_share=site.cost.macs / total,
            applies={rule.name: refusal(site, seen[site.name], rule, known) or "yes" for rule in chosen},
        )
        for site in sites
    )
    return Analysis(rows, network.name, network.notes)


@dataclass(frozen=True, slots=True, init=False)
class RewriteConvolutions:
    """:func:`optimize` as a torch.fx pass: GraphModule in, GraphModule out, the input untouched.

    Its arguments are those of :func:`optimize`; nothing is exported or timed unless ``measure``, or ``settings``, says so.
    """

    example_input: ExampleInput
    rules: Sequence[RuleSource]
    calibration: object
    settings: Settings
    structures: Sequence[Structure] = field(kw_only=True)
    progress: Progress | None = field(kw_only=True)
    name: str | None = field(kw_only=True)
    notes: Sequence[str] = field(kw_only=True)

    @signed
    def __init__(
        self,
        example_input: ExampleInput,
        rules: Sequence[RuleSource] = ("separable",),
        calibration: object = None,
        budget: Budget = None,
        seed: int | None = None,
        *,
        settings: Settings | None = None,
        **keywords: Unpack[OptimizeKeywords],
    ) -> None:
        if settings is None:
            keywords.setdefault("measure", False)
        settings, extras = asked(settings, {"budget": budget, "seed": seed}, keywords, OptimizeKeywords)
        values = {"example_input": example_input, "rules": rules, "calibration": calibration, "settings": settings}
        for name, value in (values | extras.keywords()).items():
            object.__setattr__(self, name, value)

    def __call__(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """A rewritten copy of the graph module. Raises UsageError for any other module, and what :func:`optimize` raises."""
        if not isinstance(graph_module, fx.GraphModule):
            raise UsageError(
                f"RewriteConvolutions: expected a torch.fx.GraphModule, found {type(graph_module).__name__}; give it "
                "torch.fx.symbolic_trace(model), or use convrewrite.optimize(model, ...), which takes any module"
            )
        result = optimize(graph_module, **{field.name: getattr(self, field.name) for field in fields(self)})
        assert isinstance(result.model, fx.GraphModule)
        return result.model
