"""One run: its choice of options, and everything after it. The entry points are in :mod:`convrewrite.pipeline`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from convrewrite import storing
from convrewrite.allocation import Allocation, Totals, allocate
from convrewrite.conv import Cost
from convrewrite.drafting import Work, offers_by_ratio, prices_of, survey_sites
from convrewrite.evidence import make_plan, with_kept, with_outputs
from convrewrite.exporting import Exported, export
from convrewrite.gating import in_fastest_lowering
from convrewrite.keeping import require_judge, search, shortfall
from convrewrite.latency import time_onnx
from convrewrite.layout import channels_last
from convrewrite.lifting import settle
from convrewrite.meanings import NOTHING, Meaning, require_outputs
from convrewrite.measuring import Measured, OnnxFile, measure_everything, measure_outputs
from convrewrite.planning import Ask, Fingerprint, Plan
from convrewrite.preparing import Prepared, Progress, Settings, calibrate, judging_inputs, require_runtime_dtype
from convrewrite.proposing import Offer, Proposal
from convrewrite.provenance import Provenance
from convrewrite.rehearsing import allocate_measured, rehearse
from convrewrite.replaceable import counted_as_replaced
from convrewrite.reporting.building import build_report
from convrewrite.reporting.model import Report
from convrewrite.rewriting import Outcome, Rewritten, rewrite
from convrewrite.scoring import Surveyed
from convrewrite.scratch import Scratch, temporary
from convrewrite.sites import Site
from convrewrite.state import preserved
from convrewrite.stopwatch import Stopwatch
from convrewrite.swapping import check, swap
from convrewrite.tracing import Traced
from convrewrite.version import tool_version
from convrewrite.weighting import output_weights

NOT_MEASURED = "no ONNX file was asked for: nothing was exported or timed, and onnxruntime was not compared"
"""The note of a result without one."""


@dataclass(frozen=True, slots=True)
class Result:
    """The rewritten model, the plan it followed, and the report."""

    model: nn.Module
    plan: Plan
    report: Report
    _onnx: Path | None = field(repr=False)
    _folder: Scratch = field(repr=False)

    @property
    def refused(self) -> str | None:
        """Why this result is no success, though everything ran: it is slower, or loses more than was to be kept."""
        return self.report.refused

    def save(self, folder: str | Path) -> Path:
        """Write model.pt, model.onnx, plan.json, weights.safetensors, report.json, report.md and report.html.

        They are written aside and take their place together, in one step. Raises UsageError when the folder cannot be written or
        holds other things; then it is as it was.
        """
        return storing.save(Path(folder), self.model, self.plan, self.report, self._onnx)


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be fitted, how it was come by, and the rewritten model where the choice took fitting it."""

    offers: tuple[Offer, ...]
    allocation: Allocation | None = None
    rewritten: Rewritten | None = None
    effect: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what was asked, what is shared by its stages, and the original's ONNX file where anything is measured."""

    ask: Ask
    work: Work
    scratch: Scratch
    baseline: Exported | None

    @classmethod
    def begin(
        cls,
        prepared: Prepared,
        calibration: object,
        ask: Ask,
        settings: Settings,
        progress: Progress,
        watch: Stopwatch,
        known: Mapping[str, Meaning] = NOTHING,
    ) -> "Run":
        """Everything that comes before a choice; what cannot be done is refused before the long work. ``known``: the meanings
        of outputs that a plan holds."""
        model, inputs, scratch = prepared.model, prepared.inputs, temporary()
        require_outputs(model, inputs, ask.outputs, known)
        baseline = None
        if settings.measure:
            require_runtime_dtype(model)
            with watch.timed("export the original"):
                baseline = export(model, inputs, scratch.path / "original.onnx")
        with watch.timed("calibrate"):
            data = calibrate(model, inputs, calibration, settings, progress)
            fit, held_out = channels_last(model, data.fit), channels_last(model, data.held_out)
            data = replace(data, fit=fit, held_out=held_out)
            judged = judging_inputs(inputs, data).told(model, ask.outputs, known)
        if ask.keep is not None:
            require_judge(data, ask.keep, judged.meanings)
        with watch.timed("output weights"):
            weighted = settings.output_weighting and bool(data.fit)
            weights = (
                output_weights(model, prepared.rewritable, data.fit, settings.seed, meanings=judged.meanings)
                if weighted
                else {}
            )
        return cls(ask, Work(prepared, data, judged, weights, settings, progress, watch), scratch, baseline)

    def choose(self) -> Choice:
        """By the rules' ratios, within the budget, or by the fidelity that is to be kept."""
        prepared, settings = self.work.prepared, self.work.settings
        if self.ask.by_ratio:
            with self.work.watch.timed("latency"):
                return Choice(offers_by_ratio(prepared, settings))
        surveyed = survey_sites(self.work, self.ask)
        if not self.ask.budget:
            return self._choose_by_fidelity(surveyed)
        if "latency" in self.ask.budget:
            with self.work.watch.timed("latency"):
                return self._choose_by_latency(surveyed)
        allocation = allocate(surveyed, self.ask.budget, Totals(prepared.totals))
        return Choice(self._lowered(allocation), allocation)

    def _choose_by_latency(self, surveyed: tuple[Surveyed, ...]) -> Choice:
        prepared, settings = self.work.prepared, self.work.settings
        assert self.baseline is not None, "a latency budget asks for measurement"
        self.work.progress("latency", 0, 1, "the plan as a whole, before it is fitted")
        allocation = allocate_measured(
            prepared, surveyed, self.ask.budget, Totals(prepared.totals, self._whole_seconds()), self.baseline,
            self.scratch.path, settings.threads,
        )  # fmt: skip
        self.work.progress("latency", 1, 1, f"predicted {allocation.part('latency'):.2f} of the original's")
        return Choice(allocation.offers(), allocation)

    def _choose_by_fidelity(self, surveyed: tuple[Surveyed, ...]) -> Choice:
        keep, work = self.ask.keep, self.work
        assert keep is not None
        trial = search(
            surveyed,
            Totals(work.prepared.totals),
            keep,
            lambda allocation: self._rewrite(self._lowered(allocation)),
            lambda rewritten: shortfall(work.prepared.model, rewritten, work.data, keep, work.judged.meanings),
        )
        return Choice(self._lowered(trial.allocation), trial.allocation, trial.rewritten)

    def _whole_seconds(self) -> float:
        assert self.baseline is not None
        inputs = self.work.prepared.inputs
        one = tuple(tensor[:1] for tensor in inputs) if self.baseline.dynamic_batch else inputs
        return time_onnx(self.baseline.path, one, threads=self.work.settings.threads) / len(one[0])

    def _lowered(self, allocation: Allocation) -> tuple[Offer, ...]:
        """The chosen options in their fastest lowering; where the survey measured time, they are in it already."""
        offers, settings = allocation.offers(), self.work.settings
        timed = any(entry.seconds is not None for entry in allocation.surveyed)
        if timed or not settings.measure:
            return offers
        with self.work.watch.timed("latency"):
            return in_fastest_lowering(offers, prices_of(self.work.prepared, settings))

    def _rewrite(self, offers: Sequence[Offer]) -> Rewritten:
        work, prepared = self.work, self.work.prepared
        return rewrite(
            prepared.model, prepared.traced, offers, work.data, prepared.structures, seed=work.settings.seed,
            memory=work.settings.memory, weights=work.weights, progress=work.progress, stopwatch=work.watch,
        )  # fmt: skip

    def _fitted(self, choice: Choice) -> Choice:
        """The choice fitted; one that came from an allocation is checked as a whole, and bettered by swaps where it does more
        harm than its parts promised."""
        if choice.rewritten is not None:
            return choice
        rewritten = self._rewrite(choice.offers)
        if choice.allocation is None or self.work.settings.fast or not self.work.data.fit:
            return replace(choice, rewritten=rewritten)
        checked = check(self.work, choice.allocation, rewritten)
        if checked.effect <= choice.allocation.effect:  # no more harm than that of the parts: nothing to gain
            return replace(choice, rewritten=rewritten, effect=checked.effect)
        attempt = lambda allocation: self._rewrite(self._lowered(allocation))  # noqa: E731
        best = swap(self.work, checked, self.ask.budget, self._measures_within, attempt)
        return Choice(self._lowered(best.allocation), best.allocation, best.rewritten, best.effect)

    def _measures_within(self, allocation: Allocation) -> bool:
        """Whether the whole plan measures within the latency asked for, if any was: the times of options do not add up."""
        if "latency" not in self.ask.budget:
            return True
        prepared, threads = self.work.prepared, self.work.settings.threads
        assert self.baseline is not None, "a latency budget asks for measurement"
        with self.work.watch.timed("latency"):
            measured = rehearse(prepared, allocation.offers(), self.baseline, self.scratch.path, threads)
        return measured <= self.ask.budget["latency"]

    def plan(self, choice: Choice) -> Plan:
        """The plan of a choice that was not fitted; where a rule offers several options, the cheapest."""
        chosen = [
            (o.site, min(o.proposals, key=lambda p: p.cost.macs) if o.proposals else None, o.reason)
            for o in choice.offers
        ]
        return self._plan_of(chosen, choice.allocation)

    def _plan_of(
        self, chosen: Sequence[tuple[Site, Proposal | None, str | None]], allocation: Allocation | None
    ) -> Plan:
        work = self.work
        return make_plan(
            work.prepared, self.ask, work.settings, tool_version(), chosen, allocation, work.judged.meanings
        )

    def finish(self, choice: Choice, name: str, notes: Sequence[str], plan: Plan | None = None) -> Result:
        """Fit and apply, measure, report. ``plan``: the one that is carried out, else one is made of the choice."""
        work, prepared, settings = self.work, self.work.prepared, self.work.settings
        choice = self._fitted(choice)
        rewritten = choice.rewritten
        assert rewritten is not None
        chosen = [(o.site, o.proposal, o.reason) for o in rewritten.outcomes]
        if plan is None:
            followed = self._plan_of(chosen, choice.allocation)
        else:
            followed = with_kept(plan, {o.site.name: o.reason for o in rewritten.outcomes if o.reason is not None})
            followed = with_outputs(followed, work.judged.meanings)
        changed = [outcome.site for outcome in rewritten.outcomes if outcome.proposal is not None]
        settled = settle(prepared.original, prepared.lifted, rewritten.model, changed)
        after = counted_as_replaced(prepared.model, settled, changed, prepared.inputs)
        onnx = self.scratch.path / "model.onnx" if self.baseline is not None else None
        with work.watch.timed("verify"), preserved(settled.model):
            measured = self._measured(settled.model, onnx, followed)
            saved = self._predicted_saving(rewritten.outcomes) if onnx is not None else None
        report = build_report(
            model=name,
            input_shapes=[tuple(tensor.shape) for tensor in prepared.inputs],
            plan=followed,
            ask=self.ask,
            settings=settings,
            calibration=work.data,
            outcomes=rewritten.outcomes,
            costs=_costs(settled.model, prepared.totals.macs, after, rewritten.outcomes),
            measured=measured,
            predicted_saving=saved,
            notes=[
                *notes, *settled.notes, *work.data.notes, *_lost(prepared.traced), *measured.notes,
                *_nothing_done(rewritten.outcomes), *([] if onnx is not None else [NOT_MEASURED]),
            ],
            seconds=work.watch.seconds,
        )  # fmt: skip
        return Result(settled.model, followed, report, onnx, self.scratch)

    def _measured(self, rewritten: nn.Module, onnx: Path | None, plan: Plan) -> Measured:
        prepared, work = self.work.prepared, self.work
        if onnx is None or self.baseline is None:
            return measure_outputs(prepared.model, rewritten, work.judged)
        result = Fingerprint.of(rewritten)
        provenance = Provenance(str(plan.model), str(result), plan.tool_version, work.judged.meanings)
        return measure_everything(
            prepared.model,
            rewritten,
            prepared.inputs,
            work.judged,
            self.baseline,
            OnnxFile(onnx, provenance.metadata()),
            work.settings.threads,
            work.progress,
        )

    def _predicted_saving(self, outcomes: Sequence[Outcome]) -> float:
        """Seconds that the rewritten sites save, from the times of their options alone."""
        prices = prices_of(self.work.prepared, self.work.settings)
        changed = [(o.site, o.proposal) for o in outcomes if o.proposal is not None]
        return sum(prices.saving(site, proposal) for site, proposal in changed)


def _costs(result: nn.Module, before: int, after: int, outcomes: Sequence[Outcome]) -> tuple[Cost, Cost]:
    """Those of the whole model before and after, the MACs as they were counted. A fixed kernel, one that is a buffer, counts as
    parameters where it was rewritten to some; where its site is kept it is a buffer again, which the model that was
    prepared does not show."""
    changed = [(o.site.cost, o.proposal.cost) for o in outcomes if o.proposal is not None]
    parameters = sum(parameter.numel() for parameter in result.parameters())
    return Cost(parameters + sum(b.parameters - a.parameters for b, a in changed), before), Cost(parameters, after)


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
