"""One run: its choice of options, and everything after it. The entry points are in :mod:`convrewrite.pipeline.api`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrewrite.conv import Cost
from convrewrite.errors import PlanError, UsageError
from convrewrite.exports import Written
from convrewrite.folders import Scratch, temporary
from convrewrite.graph import Lifted, Site
from convrewrite.inputs import Inputs
from convrewrite.meanings import NOTHING, Meaning, require_outputs
from convrewrite.modules import preserved, put_on, tally
from convrewrite.onnx_files import Provenance
from convrewrite.onnx_graph import exporter_of
from convrewrite.pipeline.forms import Forms, forms_of
from convrewrite.pipeline.gathering import gathered
from convrewrite.pipeline.narrowing import narrowed
from convrewrite.pipeline.notes import notes_on
from convrewrite.pipeline.prepare import prepare_copy
from convrewrite.pipeline.refined import refined
from convrewrite.pipeline.workplace import HOME, Workplace
from convrewrite.planning import (
    Allocation,
    Choice,
    Fingerprint,
    Plan,
    Planner,
    with_kept,
    with_outputs,
)
from convrewrite.progress import Progress, Stopwatch, silent
from convrewrite.reporting import build_report
from convrewrite.results import ONNX, Result
from convrewrite.rewriting import (
    Outcome,
    Prepared,
    Rewritten,
    Work,
    counted_as_replaced,
    run_cache_of,
    settle,
)
from convrewrite.rules import Rule
from convrewrite.runtime import Baseline, Measured, Unmeasured, measure_everything, measure_outputs
from convrewrite.settings import Constraints, Settings
from convrewrite.state import parameters_of
from convrewrite.structures import Structure

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what its stages share, its planner, and the original's ONNX file where anything is measured. Stages compute at
    ``place`` on ``placed``, the work on that device; ``work`` and ``planner`` are on the processor."""

    work: Work
    planner: Planner
    scratch: Scratch
    baseline: Baseline | None
    place: Workplace
    placed: Work

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
        """A run of the caller's model that has everything needed to choose. The model is not touched."""
        constraints = settings.constraints
        prepared = prepare_copy(model, inputs, rules, structures, left=constraints.left)
        return cls.begin(prepared, calibration, constraints, settings, progress, Stopwatch())

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
        """Do everything that comes before a choice; what cannot be done is refused before the long work. ``known``: the meanings
        of outputs that a plan holds."""
        settings = settings.with_times()
        _require_its_times(prepared, constraints, settings)
        prepared = narrowed(prepared, settings)
        model, inputs, scratch = prepared.model, prepared.inputs, temporary()
        require_outputs(model, inputs, constraints.outputs, known, repeatable=settings.measure)
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
        place = Workplace.of(settings.device, prepared.origin)
        placed = place.start(prepared)
        work = place.do(
            lambda device: gathered(
                placed if device == placed.device else prepared,
                calibration,
                constraints,
                settings,
                progress,
                watch,
                known,
            )
        )
        home = work.on(HOME)
        return cls(home, Planner(constraints, home, baseline or Unmeasured()), scratch, baseline, place, work)

    def choose(self) -> Choice:
        """What every site is to become. Raises PlanError for a budget that cannot be met."""
        return self.place.do(lambda device: self._planner(device).choose())

    def surveyed(self) -> "Run":
        """The run with all options of all sites measured, so that several choices can be made from them."""
        found = self.place.do(lambda device: self._planner(device).survey())
        return replace(self, planner=replace(self.planner, surveyed=found))

    def plan(self) -> Plan:
        """Only choose. Where several candidates compete at a site at their rules' own ratios, they are fitted, as the fits
        decide."""
        choice = self.choose()
        if choice.allocation is None and any(len(shortlist.candidates) > 1 for shortlist in choice.shortlists):
            rewritten, _ = self.place.do(lambda device: self._planner(device).fit(choice))
            return self.planner.plan_of([(o.site, o.candidate, o.reason) for o in rewritten.outcomes], None)
        return self.planner.plan(choice)

    def _planner(self, device: torch.device) -> Planner:
        """The planner that chooses and fits on this device, with the results of earlier runs on the same device."""
        work = self.placed
        if device != work.prepared.device:
            home = self.work
            cache = run_cache_of(home.prepared, home.data, home.evaluation, home.weights, home.settings)
            work = replace(home, cache=cache)
        return replace(self.planner, work=work)

    def _fitted(self, choice: Choice, device: torch.device) -> tuple[Rewritten, Allocation | None, list[str]]:
        """Fit and refine a choice; returns the result, its allocation, and notes on the refinement."""
        planner = self._planner(device)
        if choice.fitted is not None:
            put_on(device, choice.fitted.rewritten.model)
        rewritten, allocation = planner.fit(choice)
        return rewritten, allocation, refined(planner.work, rewritten, planner.constraints.keep)

    def finish(self, choice: Choice, name: str, notes: Sequence[str], plan: Plan | None = None) -> Result:
        """Fit and apply, measure, report. ``plan``: the one that is carried out; None: one is made from the choice."""
        work, prepared = self.work, self.work.prepared
        rewritten, allocation, refinement = self.place.do(lambda device: self._fitted(choice, device))
        put_on(HOME, rewritten.model)
        followed = self._followed(rewritten, allocation, plan)
        changed = [outcome.site for outcome in rewritten.outcomes if outcome.candidate is not None]
        settled = settle(prepared.original, prepared.lifted, rewritten.model, changed)
        counted = self._counted(settled, rewritten.model, changed)
        measured = self._measured(settled.model, followed, rewritten.outcomes)
        costs = _costs(settled.model, prepared, rewritten.outcomes)
        file = self._file(settled.model, followed)
        written = self._written(settled.model, file)
        report = build_report(
            model=name,
            plan=followed,
            constraints=self.planner.constraints,
            work=work,
            outcomes=rewritten.outcomes,
            costs=costs,
            measured=measured,
            notes=[
                *notes, *settled.notes, *self.place.notes, *refinement,
                *notes_on(work, rewritten.outcomes, costs, counted, measured, exported=self.baseline is not None),
            ],
        )  # fmt: skip
        further = [path for form in written for path in form.files]
        model = put_on(prepared.origin, settled.model)
        return Result(model, followed, report.with_exports(written), file, self.scratch, further)

    def _counted(self, settled: Lifted, rewritten: nn.Module, changed: Sequence[Site]) -> int:
        """The MACs of one example in a run of the result, which also checks that every rewritten site runs."""
        prepared = self.work.prepared
        macs = counted_as_replaced(prepared.model, settled, changed, prepared.inputs)
        if _computes_kernels(prepared.lifted, changed):  # which the count of the original takes for constants
            macs = tally(rewritten, prepared.inputs).macs
        return macs + prepared.hidden.macs

    def _written(self, rewritten: nn.Module, file: Path | None) -> tuple[Written, ...]:
        """The result in the other forms that were asked for."""
        work = self.work
        if not work.settings.exports:
            return ()
        with work.watch.timed("export"):
            forms = forms_in(work.prepared, self.baseline, work.settings)
            return forms.write(rewritten, file, work.evaluation, work.data.fit, self.scratch.path, work.progress)

    def _file(self, rewritten: nn.Module, plan: Plan) -> Path | None:
        """The result's ONNX file: for an ONNX graph there is one whether anything was measured or not."""
        if self.baseline is not None:
            return self.baseline.result
        exporter = exporter_of(self.work.prepared.original)
        if exporter.exports:
            return None
        path = self.scratch.path / ONNX
        exporter.rewritten(rewritten, self.work.prepared.inputs, path, self._provenance(rewritten, plan).metadata())
        return path

    def _followed(self, rewritten: Rewritten, allocation: Allocation | None, plan: Plan | None) -> Plan:
        """The plan that the result carries out: a new one, or the given one with those sites kept that had to be kept after
        all."""
        if plan is None:
            return self.planner.plan_of([(o.site, o.candidate, o.reason) for o in rewritten.outcomes], allocation)
        kept = with_kept(plan, {o.site.name: o.reason for o in rewritten.outcomes if o.reason is not None})
        return with_outputs(kept, self.work.evaluation.meanings)

    def _measured(self, rewritten: nn.Module, plan: Plan, outcomes: Sequence[Outcome]) -> Measured:
        """What the result computes and how fast it is, as far as that was asked for, and what it was predicted to save."""
        prepared, work, baseline = self.work.prepared, self.work, self.baseline
        with work.watch.timed("verify"), preserved(rewritten):
            if baseline is None:
                found, saved = measure_outputs(prepared.model, rewritten, work.evaluation), None
            else:
                metadata = self._provenance(rewritten, plan).metadata()
                found = measure_everything(
                    prepared.model, rewritten, prepared.inputs, work.evaluation, baseline, metadata, work.progress
                )
                saved = self.planner.predicted_saving(outcomes)
        LOG.info("seconds of stages: %s", work.watch)
        return replace(found, predicted_saving=saved, **self._measured_elsewhere())

    def _measured_elsewhere(self) -> dict[str, Any]:
        """The original's seconds and runtime on the machine that times came from, if that is another one."""
        profile = self.work.settings.profile
        if self.baseline is None or profile is None:
            return {}
        return {"original_seconds": self.baseline.seconds(), "original_runtime": profile.runtime}

    def _provenance(self, rewritten: nn.Module, plan: Plan) -> Provenance:
        result = Fingerprint.of(rewritten)
        source = exporter_of(self.work.prepared.original).source
        return Provenance(str(plan.model), str(result), plan.tool_version, self.work.evaluation.meanings, source)


def forms_in(prepared: Prepared, baseline: Baseline | None, settings: Settings) -> Forms:
    """The other forms that are asked of a run."""
    onnx = None if baseline is None else baseline.original.path
    exporter = exporter_of(prepared.original, settings.opset, settings.free_axes)
    return forms_of(settings.exports, prepared.model, prepared.inputs, exporter, onnx, settings.free_axes)


def _costs(result: nn.Module, prepared: Prepared, outcomes: Sequence[Outcome]) -> tuple[Cost, Cost]:
    """The costs of the whole model: before, as counted; after, less what was saved at every site. A kernel that is a buffer
    counts as parameters only where its site was rewritten: in a kept site it is a buffer again, though the prepared model has it
    as a parameter. The same holds for the parameters that a kept site's kernel is computed from."""
    changed = [(o.site.cost, o.candidate.cost) for o in outcomes if o.candidate is not None]
    parameters = sum(parameter.numel() for parameter in parameters_of(result)) + prepared.hidden.parameters
    before = parameters + sum(b.parameters - a.parameters for b, a in changed)
    saved = sum(b.macs - a.macs for b, a in changed)
    return Cost(before, prepared.totals.macs), Cost(parameters, prepared.totals.macs - saved)


def _computes_kernels(lifted: Lifted, changed: Sequence[Site]) -> bool:
    """Whether the result computes the kernel of a site that was kept anew at every call."""
    names = {site.name for site in changed}
    return any(conv.computed and one.module not in names for one in lifted.lifts for conv in one.convs)


def _require_its_times(prepared: Prepared, constraints: Constraints, settings: Settings) -> None:
    """Raise PlanError for a file with the times of another model, and UsageError where times do not count: options then come from
    all ranks, and a file has the times of a few."""
    profile = settings.profile
    if profile is None or not settings.measure:
        return
    if not (constraints.for_speed or constraints.by_ratio):
        raise UsageError(
            f"--timings {settings.timings}, --any-speed: expected one of them with a budget of MACs or parameters, or with a "
            "fidelity to keep, as times do not count then; leave one out"
        )
    if settings.threads not in (1, profile.threads):
        raise UsageError(
            f"--timings {settings.timings}, --threads {settings.threads}: expected the threads that its times are of, "
            f"{profile.threads}, found others; leave out --threads, or profile with so many"
        )
    if profile.model is not None and profile.model != prepared.layout:
        raise PlanError(
            f"--timings {settings.timings}: expected times of this model at this input size, found those of another; profile "
            "this one (`convrewrite profile`)"
        )
