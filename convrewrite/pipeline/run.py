"""One run: its choice of options, and everything after it. The entry points are in :mod:`convrewrite.pipeline.api`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from convrewrite.calibration import calibrate, channels_last, evaluation_inputs
from convrewrite.conv import Cost
from convrewrite.exports import Written
from convrewrite.folders import Scratch, temporary
from convrewrite.graph import Traced
from convrewrite.inputs import Inputs
from convrewrite.meanings import NOTHING, Meaning, require_outputs
from convrewrite.modules import preserved, private_copy
from convrewrite.onnx_files import Provenance
from convrewrite.onnx_graph import batch_of, exporter_of, graph_inputs
from convrewrite.pipeline.forms import Forms, forms_of
from convrewrite.pipeline.narrowing import narrowed
from convrewrite.pipeline.prepare import prepare
from convrewrite.pipeline.refined import refined
from convrewrite.planning import (
    Allocation,
    Choice,
    Fingerprint,
    Plan,
    Planner,
    require_evaluable,
    with_kept,
    with_outputs,
)
from convrewrite.progress import Progress, Stopwatch, silent
from convrewrite.reporting import build_report
from convrewrite.results import Result
from convrewrite.rewriting import (
    Outcome,
    Prepared,
    Rewritten,
    Work,
    counted_as_replaced,
    output_weights,
    run_cache_of,
    settle,
)
from convrewrite.rules import Rule
from convrewrite.runtime import Baseline, Measured, Unmeasured, measure_everything, measure_outputs
from convrewrite.settings import Constraints, Settings
from convrewrite.structures import Structure
from convrewrite.targets import read_profile

LOG = logging.getLogger(__name__)

NOT_MEASURED = "no ONNX file was asked for: nothing was exported or timed, and onnxruntime was not compared"
"""The note of a result without one."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what is shared by its stages, who plans, and the original's ONNX file where anything is measured."""

    work: Work
    planner: Planner
    scratch: Scratch
    baseline: Baseline | None

    @classmethod
    def to_plan(
        cls,
        model: nn.Module,
        inputs: Inputs,
        rules: Sequence[Rule],
        calibration: object,
        settings: Settings,
        structures: Sequence[Structure] = (),
        progress: Progress = silent,
    ) -> "Run":
        """A run of the caller's model, which is not touched, that has all it takes to choose."""
        prepared = prepare(private_copy(model, inputs), inputs, rules, structures, model)
        return cls.begin(prepared, calibration, settings.constraints, settings, progress, Stopwatch())

    @classmethod
    def begin(
        cls,
        prepared: Prepared,
        calibration: object,
        constraints: Constraints,
        settings: Settings,
        progress: Progress,
        watch: Stopwatch,
        known: Mapping[str, Meaning] = NOTHING,
    ) -> "Run":
        """Everything that comes before a choice; what cannot be done is refused before the long work. ``known``: the meanings
        of outputs that a plan holds."""
        prepared = narrowed(prepared, settings)
        model, inputs, scratch = prepared.model, prepared.inputs, temporary()
        require_outputs(model, inputs, constraints.outputs, known)
        progress("prepare", 0, 1, "export the original")
        with watch.timed("export the original"):
            exporter = exporter_of(prepared.original, settings.opset, settings.free_axes)
            baseline = (
                Baseline.of(
                    model,
                    inputs,
                    scratch.path,
                    settings.clock,
                    settings.threads,
                    exporter,
                    settings.target,
                    settings.timings is not None,
                )
                if settings.measure
                else None
            )
            forms_in(prepared, baseline, settings).rehearse()
        progress("prepare", 0, 1, "inputs")
        with watch.timed("calibrate"):
            data = calibrate(
                model, inputs, calibration, seed=settings.seed, memory=settings.memory, progress=progress,
                batch=batch_of(prepared.original), graph_inputs=graph_inputs(prepared.original),
            )  # fmt: skip
            fit, held_out = channels_last(model, data.fit), channels_last(model, data.held_out)
            data = replace(data, fit=fit, held_out=held_out)
            LOG.info("inputs: %s, fitted on %d, %d held out", data.source, data.fitted_on, data.held_out_count)
            evaluation = evaluation_inputs(inputs, data, batch_of(prepared.original)).told(
                model, constraints.outputs, known
            )
        for output, meaning in evaluation.meanings.items():
            LOG.info("output %s is taken for %s: %s", output, meaning.kind, meaning.reason)
        if constraints.keep is not None:
            require_evaluable(data, constraints.keep, evaluation.meanings)
        weights: dict[str, Tensor] = {}
        if settings.output_weighting and data.fit:
            progress("prepare", 0, 1, "what output channels count for")
            with watch.timed("output weights"):
                weights = output_weights(
                    model, prepared.rewritable, data.fit, settings.seed, meanings=evaluation.meanings
                )
        with watch.timed("look up earlier runs"):
            cache = run_cache_of(prepared, data, evaluation, weights, settings)
        progress("prepare", 1, 1, "done")
        work = Work(prepared, data, evaluation, weights, settings, progress, watch, cache)
        return cls(work, Planner(constraints, work, baseline or Unmeasured()), scratch, baseline)

    def plan(self) -> Plan:
        """Only choose. Where several candidates compete at a site by their rules' ratios, they are fitted, as the fits decide."""
        choice = self.planner.choose()
        if choice.allocation is None and any(len(shortlist.candidates) > 1 for shortlist in choice.shortlists):
            rewritten, _ = self.planner.fit(choice)
            return self.planner.plan_of([(o.site, o.candidate, o.reason) for o in rewritten.outcomes], None)
        return self.planner.plan(choice)

    def finish(self, choice: Choice, name: str, notes: Sequence[str], plan: Plan | None = None) -> Result:
        """Fit and apply, measure, report. ``plan``: the one that is carried out, else one is made of the choice."""
        work, prepared = self.work, self.work.prepared
        rewritten, allocation = self.planner.fit(choice)
        refinement = refined(work, rewritten)
        followed = self._followed(rewritten, allocation, plan)
        changed = [outcome.site for outcome in rewritten.outcomes if outcome.candidate is not None]
        settled = settle(prepared.original, prepared.lifted, rewritten.model, changed)
        after = counted_as_replaced(prepared.model, settled, changed, prepared.inputs) + prepared.hidden.macs
        with work.watch.timed("verify"), preserved(settled.model):
            measured = self._measured(settled.model, followed)
            LOG.info("seconds of stages: %s", work.watch)
            saved = None if self.baseline is None else self.planner.predicted_saving(rewritten.outcomes)
        file = self._file(settled.model, followed)
        written = self._written(settled.model, file)
        report = build_report(
            model=name,
            plan=followed,
            constraints=self.planner.constraints,
            work=work,
            outcomes=rewritten.outcomes,
            costs=_costs(settled.model, prepared, after, rewritten.outcomes),
            measured=replace(measured, predicted_saving=saved),
            notes=[
                *notes, *settled.notes, *refinement, *work.data.notes, *_lost(prepared.traced), *measured.notes,
                *_nothing_done(rewritten.outcomes), *_elsewhere(work.settings),
                *([NOT_MEASURED] if self.baseline is None else []),
            ],
        )  # fmt: skip
        further = [path for form in written for path in form.files]
        return Result(settled.model, followed, report.with_exports(written), file, self.scratch, further)

    def _written(self, rewritten: nn.Module, file: Path | None) -> tuple[Written, ...]:
        """The result in the other forms that were asked for."""
        work = self.work
        if not work.settings.exports:
            return ()
        with work.watch.timed("export"):
            forms = forms_in(work.prepared, self.baseline, work.settings)
            return forms.write(rewritten, file, work.evaluation, work.data.fit, self.scratch.path, work.progress)

    def _file(self, rewritten: nn.Module, plan: Plan) -> Path | None:
        """The result's ONNX file: of an ONNX graph there is one whether anything was measured or not."""
        if self.baseline is not None:
            return self.baseline.result
        exporter = exporter_of(self.work.prepared.original)
        if exporter.exports:
            return None
        path = self.scratch.path / "model.onnx"
        exporter.rewritten(rewritten, self.work.prepared.inputs, path, self._provenance(rewritten, plan).metadata())
        return path

    def _followed(self, rewritten: Rewritten, allocation: Allocation | None, plan: Plan | None) -> Plan:
        """The plan that the result carries out: the given one, where sites had to be kept after all without them."""
        if plan is None:
            return self.planner.plan_of([(o.site, o.candidate, o.reason) for o in rewritten.outcomes], allocation)
        kept = with_kept(plan, {o.site.name: o.reason for o in rewritten.outcomes if o.reason is not None})
        return with_outputs(kept, self.work.evaluation.meanings)

    def _measured(self, rewritten: nn.Module, plan: Plan) -> Measured:
        prepared, work = self.work.prepared, self.work
        if self.baseline is None:
            return measure_outputs(prepared.model, rewritten, work.evaluation)
        return measure_everything(
            prepared.model,
            rewritten,
            prepared.inputs,
            work.evaluation,
            self.baseline,
            self._provenance(rewritten, plan).metadata(),
            work.progress,
        )

    def _provenance(self, rewritten: nn.Module, plan: Plan) -> Provenance:
        result = Fingerprint.of(rewritten)
        source = exporter_of(self.work.prepared.original).source
        return Provenance(str(plan.model), str(result), plan.tool_version, self.work.evaluation.meanings, source)


def forms_in(prepared: Prepared, baseline: Baseline | None, settings: Settings) -> Forms:
    """The other forms that a run is asked for."""
    onnx = None if baseline is None else baseline.original.path
    exporter = exporter_of(prepared.original, settings.opset, settings.free_axes)
    return forms_of(settings.exports, prepared.model, prepared.inputs, exporter, onnx, settings.free_axes)


def _costs(result: nn.Module, prepared: Prepared, after: int, outcomes: Sequence[Outcome]) -> tuple[Cost, Cost]:
    """Those of the whole model before and after, the MACs as they were counted. A fixed kernel, one that is a buffer, counts as
    parameters where it was rewritten to some; where its site is kept it is a buffer again, which the model that was
    prepared does not show."""
    changed = [(o.site.cost, o.candidate.cost) for o in outcomes if o.candidate is not None]
    parameters = sum(parameter.numel() for parameter in result.parameters()) + prepared.hidden.parameters
    before = parameters + sum(b.parameters - a.parameters for b, a in changed)
    return Cost(before, prepared.totals.macs), Cost(parameters, after)


def _lost(traced: Traced) -> list[str]:
    if not traced.lost:
        return []
    names = ", ".join(name or "the model itself" for name in traced.lost[:5])
    more = f" and {len(traced.lost) - 5} more" if len(traced.lost) > 5 else ""
    return [
        f"{names}{more} could not be followed as a graph: convolutions there are rewritten, "
        "but a BatchNorm that follows one is not folded into it"
    ]


def _elsewhere(settings: Settings) -> list[str]:
    if settings.timings is None:
        return []
    profile = read_profile(Path(settings.timings))
    return [f"chosen by times in {profile.describe()}, from {settings.timings}; the result was not timed here"]


def _nothing_done(outcomes: Sequence[Outcome]) -> list[str]:
    if any(outcome.candidate is not None for outcome in outcomes):
        return []
    return ["no site was rewritten; each row says why, and `convrewrite analyze` shows what other rules would take"]
