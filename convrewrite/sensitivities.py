"""What every option does to the model's outputs, measured with only that site rewritten.

Weight energies, or output errors of the layers, cannot rank layers: an error of 1.7 % at one of them cost a KL of 0.28,
one of 1.3 % at another 0.001. So the effect J is measured on held-out inputs, at a few ranks of each structure, and is
interpolated between them, log-log in the site's output error; and that error log-log in the cost.

The output error of every sampled option comes from its fit to the site's inputs in the original network. Ladders that stay
far behind another in a first, cheap fit are dropped before the dear ones.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convrewrite.calibration import Calibration
from convrewrite.fitting import LARGE, Fit
from convrewrite.outputs import named_outputs
from convrewrite.pricing import MIN_GAIN, Prices, aligned
from convrewrite.propagation import Propagation
from convrewrite.proposing import Ladder, Menu, Proposal
from convrewrite.sites import Site
from convrewrite.stopwatch import Stopwatch
from convrewrite.streams import Inputs
from convrewrite.structure import Structure
from convrewrite.tracing import Traced, run
from convrewrite.verifying import effect_of
from convrewrite.workpiece import Workpiece

LEAST_RATIO = 0.03
"""Of a site's own MACs: cheaper options are not sampled."""

FAR_BEHIND = 1.5
"""A ladder whose cheap fits have so many times the error of others at equal cost, everywhere, is dropped."""

LEAST_ERROR = 1e-12
LEAST_EFFECT = 1e-12


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: ``ranks`` fitted per ladder, ``measured`` of them through the rest of the model, on at most
    ``examples`` held-out inputs; ``iterations`` of refinement for each fit; ``inputs`` to fit on, None for all."""

    ranks: int = 4
    measured: int = 3
    iterations: int = 12
    large_iterations: int = 2
    examples: int = 512
    inputs: int | None = None
    rounds: int = 15


THOROUGH = Effort()
FAST = Effort(ranks=3, measured=1, iterations=4, large_iterations=0, examples=32, inputs=64, rounds=7)


@dataclass(frozen=True, slots=True)
class Scored:
    """A proposal with its relative squared output error, its effect on the model's outputs (KL in nats, or relative squared
    error), whether that effect was measured or interpolated, and its seconds where they were measured."""

    proposal: Proposal
    error: float
    effect: float
    measured: bool
    seconds: float | None = None

    def amount(self, resource: str) -> float:
        """What it costs of "macs", "params" or "latency"."""
        if resource == "latency":
            assert self.seconds is not None, "a latency budget needs measured times"
            return self.seconds
        return self.proposal.cost.macs if resource == "macs" else self.proposal.cost.parameters


@dataclass(frozen=True, slots=True)
class Dropped:
    """A proposal that was fitted, and the reason why it is none of the options."""

    proposal: Proposal
    error: float
    reason: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Surveyed:
    """All that a site could become; ``seconds`` are those of the site as it is. ``reason`` says why there is nothing.

    ``must_change``: to keep it as it is, is not among the options.
    """

    site: Site
    options: tuple[Scored, ...]
    dropped: tuple[Dropped, ...] = ()
    seconds: float | None = None
    reason: str | None = None
    must_change: bool = False


Progress = Callable[[str, int, int, str], None]


def survey(
    model: nn.Module,
    traced: Traced,
    menus: Sequence[Menu],
    calibration: Calibration,
    structures: Mapping[str, Structure],
    *,
    effort: Effort,
    prices: Prices | None,
    weights: Mapping[str, Tensor],
    seed: int,
    memory: int,
    progress: Progress,
    stopwatch: Stopwatch,
) -> tuple[Surveyed, ...]:
    """Every site's options with their errors and effects. ``prices``: measure their seconds too, drop the slow ones."""
    active = [menu.site for menu in menus if menu.ladders]
    chosen = _fewer(calibration, effort)
    walk = Propagation(model, traced, active, (*chosen.fit, *chosen.held_out), memory)
    judge = Judge.of(model, walk, chosen, effort)
    found: list[Surveyed] = []
    try:
        for menu in menus:
            if not menu.ladders:
                found.append(Surveyed(menu.site, (), reason=menu.reason))
                continue
            done = sum(1 for entry in found if entry.site in active)
            progress("survey", done, len(active), menu.site.name)
            piece = Workpiece.of(walk, menu.site, chosen, weights, seed, stopwatch)
            bench = _Bench(menu.site, piece, structures, judge, effort, prices, stopwatch)
            found.append(bench.survey(menu.ladders))
            progress("survey", done + 1, len(active), f"{menu.site.name}: {len(found[-1].options)} options")
    finally:
        walk.close()
    return tuple(found)


def _fewer(calibration: Calibration, effort: Effort) -> Calibration:
    """The calibration with as many inputs to fit on as the effort allows."""
    if effort.inputs is None:
        return calibration
    return replace(calibration, fit=_first(calibration.fit, effort.inputs))


def _first(batches: Sequence[Inputs], count: int) -> tuple[Inputs, ...]:
    """Whole batches and a part of the last one, ``count`` examples in all."""
    found: list[Inputs] = []
    for batch in batches:
        if count > 0:
            found.append(tuple(tensor[:count] for tensor in batch))
        count -= len(batch[0])
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Judge:
    """The original's outputs on the batches that effects are measured on."""

    walk: Propagation
    batches: tuple[int, ...]
    originals: tuple[dict[str, Tensor], ...]

    @classmethod
    def of(cls, model: nn.Module, walk: Propagation, calibration: Calibration, effort: Effort) -> "Judge":
        """On held-out inputs, where there are any."""
        all_batches = (*calibration.fit, *calibration.held_out)
        first = len(calibration.fit) if calibration.held_out else 0
        batches, examples = [], 0
        for index in range(first, len(all_batches)):
            if examples < effort.examples:
                batches.append(index)
                examples += len(all_batches[index][0])
        originals = tuple(named_outputs(run(model, all_batches[index])) for index in batches)
        return cls(walk, tuple(batches), originals)

    def effect(self, site: Site, module: nn.Module) -> float:
        """J of a module in the site's place."""
        outputs = self.walk.outputs(site, module, self.batches)
        return effect_of(zip(self.originals, map(named_outputs, outputs), strict=True))


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sampled rank of a ladder and its fit."""

    proposal: Proposal
    fit: Fit
    seconds: float | None = None

    @property
    def log_cost(self) -> float:
        return math.log(max(1, self.proposal.cost.macs))

    @property
    def log_error(self) -> float:
        return math.log(max(LEAST_ERROR, self.fit.held_out_error))

    def dropped(self, reason: str) -> Dropped:
        return Dropped(self.proposal, self.fit.held_out_error, reason, self.seconds)


@dataclass(frozen=True, slots=True)
class _Curve:
    """A ladder with its samples, from cheap to dear."""

    ladder: Ladder
    samples: tuple[_Sample, ...]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Error over cost, both as logarithms."""
        return sorted((sample.log_cost, sample.log_error) for sample in self.samples)


@dataclass(frozen=True, slots=True)
class _Bench:
    """One site, and all that measures its options."""

    site: Site
    piece: Workpiece
    structures: Mapping[str, Structure]
    judge: Judge
    effort: Effort
    prices: Prices | None
    stopwatch: Stopwatch

    def survey(self, ladders: Sequence[Ladder]) -> Surveyed:
        with self.stopwatch.timed("solves"), self.piece.solving_threads():
            rough = [_Curve(ladder, tuple(self._fit(p, 0) for p in self._ranks(ladder))) for ladder in ladders]
            rough = [curve for curve in rough if curve.samples]
            near, far = _competitive(rough)
            curves = [replace(curve, samples=self._refined(curve.samples)) for curve in near]
        dropped = [
            sample.dropped("far behind others of the same cost in a first fit") for c in far for sample in c.samples
        ]
        before = None
        if self.prices is not None:
            with self.stopwatch.timed("latency"):
                before = self.prices.original(self.site)
                priced = [replace(curve, samples=self._priced(curve.samples)) for curve in curves]
            curves, slow = self._fast_enough(priced, before)
            dropped += slow
        curves, wrong = _faithful_enough(curves)
        with self.stopwatch.timed("effects"):
            options = [scored for curve in curves for scored in self._scored(curve)]
        reason = None if options else _nothing_left(dropped)
        return Surveyed(self.site, tuple(options), (*dropped, *wrong), before, reason)

    def _fast_enough(self, curves: Sequence["_Curve"], before: float) -> tuple[list["_Curve"], list[Dropped]]:
        """Without the options that gain too little measured time."""
        kept: list[_Curve] = []
        dropped: list[Dropped] = []
        for curve in curves:
            least = curve.ladder.rule.require.min_latency_gain or MIN_GAIN
            fast = [sample for sample in curve.samples if 1 - (sample.seconds or 0.0) / before >= least]
            kept += [replace(curve, samples=tuple(fast))] if fast else []
            dropped += [s.dropped(_too_slow(s, before, least)) for s in curve.samples if s not in fast]
        return kept, dropped

    def _ranks(self, ladder: Ladder) -> list[Proposal]:
        """The sampled ranks of a ladder, from cheap to dear, about evenly spaced in the logarithm of the cost."""
        limit = (1 - ladder.rule.require.min_mac_saving) * self.site.cost.macs
        ranks = self._aligned(ladder) if self.prices is not None else ladder.ranks
        last = bisect.bisect_right(ranks, limit, key=lambda rank: ladder.at(rank).cost.macs)
        lowest = LEAST_RATIO * self.site.cost.macs
        first = bisect.bisect_left(ranks, lowest, hi=last, key=lambda rank: ladder.at(rank).cost.macs)
        usable = ranks[min(first, max(0, last - 1)) : last]
        if len(usable) <= self.effort.ranks:
            return [ladder.at(rank) for rank in usable]
        share = [i / (self.effort.ranks - 1) for i in range(self.effort.ranks)]
        wanted = [usable[0] * (usable[-1] / usable[0]) ** s for s in share]
        return [ladder.at(rank) for rank in dict.fromkeys(_nearest(usable, rank) for rank in wanted)]

    def _aligned(self, ladder: Ladder) -> Sequence[int]:
        """The ranks that fill the processor's channel blocks; all of them where none does."""
        spec = self.site.folded_spec.per_group
        stages = {rank: ladder.structure.stages(spec, {**ladder.variant, "rank": rank}) for rank in ladder.ranks}
        return [rank for rank in ladder.ranks if aligned(stages[rank])] or ladder.ranks

    def _fit(self, proposal: Proposal, iterations: int) -> _Sample:
        structure = self.structures[proposal.option.structure]
        return _Sample(proposal, self.piece.fit(structure, proposal.option, iterations=iterations))

    def _refined(self, samples: tuple["_Sample", ...]) -> tuple["_Sample", ...]:
        iterations = self.effort.iterations if self.piece.patch < LARGE else self.effort.large_iterations
        if iterations == 0 or not self.piece.seen:
            return samples
        return tuple(self._fit(sample.proposal, iterations) for sample in samples)

    def _priced(self, samples: tuple["_Sample", ...]) -> tuple["_Sample", ...]:
        assert self.prices is not None
        prices = self.prices.of(self.site, [sample.proposal for sample in samples])
        pairs = zip(samples, prices, strict=True)
        return tuple(replace(sample, proposal=price.proposal, seconds=price.seconds) for sample, price in pairs)

    def _scored(self, curve: "_Curve") -> list[Scored]:
        """The effects of a ladder's options: of all its ranks, or of the timed ones where time matters."""
        ladder, samples = curve.ladder, curve.samples
        count = min(self.effort.measured, len(samples))
        picked = sorted({round(i * (len(samples) - 1) / max(1, count - 1)) for i in range(count)}) if count > 1 else []
        picked = picked or [len(samples) // 2]
        known = {index: max(LEAST_EFFECT, self._effect(samples[index])) for index in picked}
        effects = sorted((samples[i].log_error, math.log(effect)) for i, effect in known.items())
        measured = {samples[i].proposal.option: effect for i, effect in known.items()}
        if self.prices is not None:
            rows = [(sample.proposal, sample.log_error, sample.seconds) for sample in samples]
        else:
            errors = [(sample.log_cost, sample.log_error) for sample in samples]
            ranks = [rank for rank in ladder.ranks if self._between(samples, ladder.at(rank))]
            rows = [(p, _interpolated(errors, _log_macs(p), -1.0), None) for p in map(ladder.at, ranks)]
        return [
            Scored(
                proposal,
                math.exp(error),
                measured.get(proposal.option, math.exp(_interpolated(effects, error, 1.0))),
                proposal.option in measured,
                seconds,
            )
            for proposal, error, seconds in rows
        ]

    def _between(self, samples: Sequence[_Sample], proposal: Proposal) -> bool:
        return samples[0].proposal.cost.macs <= proposal.cost.macs <= samples[-1].proposal.cost.macs

    def _effect(self, sample: _Sample) -> float:
        structure = self.structures[sample.proposal.option.structure]
        with torch.no_grad():
            return self.judge.effect(self.site, self.piece.build(structure, sample.proposal.option, sample.fit))


def _log_macs(proposal: Proposal) -> float:
    return math.log(max(1, proposal.cost.macs))


def _nearest(values: Sequence[int], wanted: float) -> int:
    return min(values, key=lambda value: (abs(value - wanted), value))


def _interpolated(points: Sequence[tuple[float, float]], x: float, slope: float) -> float:
    """Piecewise linear through points sorted by x, with this slope beyond the ends; never against the slope between."""
    if x <= points[0][0]:
        return points[0][1] + slope * (x - points[0][0])
    if x >= points[-1][0]:
        return points[-1][1] + slope * (x - points[-1][0])
    index = bisect.bisect_right([p[0] for p in points], x)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1


def _competitive(curves: Sequence[_Curve]) -> tuple[list[_Curve], list[_Curve]]:
    """Those that come near the best one at some cost, and the others."""
    near: list[_Curve] = []
    far: list[_Curve] = []
    for curve in curves:
        others = [other.points for other in curves if other is not curve]
        good = (
            all(error <= _interpolated(other, cost, -1.0) + math.log(FAR_BEHIND) for other in others)
            for cost, error in curve.points
        )
        (near if any(good) else far).append(curve)
    return near, far


def _faithful_enough(curves: Sequence[_Curve]) -> tuple[list[_Curve], list[Dropped]]:
    """Without the options whose output error their rule does not allow."""
    kept: list[_Curve] = []
    dropped: list[Dropped] = []
    for curve in curves:
        most = curve.ladder.rule.require.max_output_error or math.inf
        good = [sample for sample in curve.samples if sample.fit.held_out_error**0.5 <= most]
        kept += [replace(curve, samples=tuple(good))] if good else []
        reason = f"its output error exceeds {most:.3g}, the rule's limit"
        dropped += [sample.dropped(reason) for sample in curve.samples if sample not in good]
    return kept, dropped


def _too_slow(sample: _Sample, before: float, least: float) -> str:
    assert sample.seconds is not None
    change = sample.seconds / before - 1
    return f"changes the measured time by {change:+.0%}, less than the {least:.0%} it must gain"


def _nothing_left(dropped: Sequence[Dropped]) -> str:
    if not dropped:
        return "no option costs less than the original"
    best = min(dropped, key=lambda entry: entry.seconds or math.inf)
    return f"no option is left; the best, {best.proposal.option.describe()}, {best.reason}"
