"""The effect of every option on the model's outputs, measured with only that site rewritten.

Weight energies, or output errors of the layers, cannot rank layers: an error of 1.7 % at one layer cost a KL of 0.28, and one of
1.3 % at another 0.001. So the effect J is measured on held-out inputs, at a few ranks of each structure, and is interpolated
between them, log-log in the share of the site's output variance that an option leaves unexplained. That share is itself
interpolated, log-log in the MACs.

The output error of every sampled option comes from its fit to the site's inputs in the original network. Rank ranges that stay
far behind another in a first, cheap fit are dropped before the expensive fits.
"""

import copy
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

from convrewrite.calibration import Calibration
from convrewrite.errors import FitError
from convrewrite.fitting import LARGE, Fit
from convrewrite.graph import Site
from convrewrite.planning.candidates import usable
from convrewrite.planning.curves import (
    Curve,
    Dropped,
    FittedCandidate,
    Scored,
    Surveyed,
    between,
    competitive,
    faithful_enough,
    spread,
)
from convrewrite.planning.effects import FEW, Evaluator
from convrewrite.planning.effort import Effort, fewer
from convrewrite.planning.kept_surveys import KeptSurveys
from convrewrite.planning.latency_table import LatencyTable, change_told, gains, least_of
from convrewrite.progress import Stopwatch
from convrewrite.rewriting import UNREACHED, Propagation, SiteFit, Work, require_memory
from convrewrite.rules import Candidate, RankRange, SearchSpace
from convrewrite.structures import Option, Structure

LOG = logging.getLogger(__name__)

_Fitting = Callable[[Structure, Option], Callable[[], Fit]]
"""Makes the task that fits an option of a structure."""

REFINABLE = 2000
"""A survey refines for at most this divided by the numbers in a patch, but not for fewer than 3 iterations where it refines at
all."""


def survey(work: Work, *, effort: Effort, latency_table: LatencyTable | None) -> tuple[Surveyed, ...]:
    """Every site's options with their errors and effects. With a ``latency_table`` their seconds are measured too, and slow
    options are dropped."""
    prepared, settings = work.prepared, work.settings
    active = [space.site for space in prepared.search_spaces if space.rank_ranges]
    chosen = fewer(work.data, effort, active, prepared.batch)
    if chosen.kind != "weights only":
        require_memory(active, settings.memory)
    found, done, batches = list[Surveyed](), 0, (*chosen.fit, *chosen.held_out)
    with closing(Propagation(prepared.model, prepared.traced, active, batches, work.memory)) as walk:
        sites = _Surveys(work, chosen, active, effort, latency_table, walk)
        for space in prepared.search_spaces:
            if not space.rank_ranges:
                found.append(Surveyed(space.site, (), reason=space.reason))
                continue
            work.progress("survey", done, len(active), space.site.name)
            found.append(sites.of(space))
            LOG.info("%s", _summary(found[-1]))
            done += 1
            work.progress("survey", done, len(active), f"{space.site.name}: {len(found[-1].options)} options")
    return tuple(found)


def _summary(entry: Surveyed) -> str:
    """What a site could become, for a log."""
    if not entry.options:
        return f"{entry.site.name}: kept: {entry.reason or 'no option is left'}"
    least = min(scored.effect for scored in entry.options)
    left = f"{entry.site.name}: {len(entry.options)} options, effects from {least:.3g}, {len(entry.dropped)} left out"
    for dropped in entry.dropped:
        LOG.debug("%s: left out %s: %s", entry.site.name, dropped.candidate.option, dropped.reason)
    return left


@dataclass(slots=True)
class _RefinementGains:
    """The part of the unexplained variance of first fits that refinement left, by structure: learned where refining is cheap,
    expected where it is not tried."""

    known: dict[str, list[float]] = field(default_factory=dict)

    def learn(self, structure: str, ratio: float) -> None:
        self.known.setdefault(structure, []).append(min(1.0, ratio))

    def expected(self, structure: str) -> float:
        return statistics.median(self.known[structure]) if structure in self.known else 1.0


@dataclass
class _Surveys:
    """The surveys of all sites, front to back, including those kept from earlier runs."""

    work: Work
    chosen: Calibration
    active: Sequence[Site]
    effort: Effort
    latency_table: LatencyTable | None
    walk: Propagation
    gains: _RefinementGains = field(default_factory=_RefinementGains)

    def of(self, space: SearchSpace) -> Surveyed:
        """All options of a site, or the reason why there are none."""
        before = copy.deepcopy(self.gains.known)
        known = self._kept.find(space, before)
        if known is not None:
            found, behind = known
            self.gains.known = {name: list(ratios) for name, ratios in behind.items()}
            self.walk.pass_over(space.site)
            return found
        found = self._measured(space)
        self._kept.keep(space, before, found, self.gains.known)
        return found

    @cached_property
    def _kept(self) -> KeptSurveys:
        names = [site.name for site in self.active]
        return KeptSurveys.of(self.work.cache, self.effort, self.latency_table, names)

    @cached_property
    def _evaluator(self) -> "Evaluator":
        """Made when it is first needed, as it runs the model: not at all where every survey was kept from an earlier run."""
        prepared, meanings = self.work.prepared, self.work.evaluation.meanings
        return Evaluator.of(
            prepared.model, self.walk, self.chosen, meanings, self.active, min(FEW, self.effort.examples)
        )

    def _measured(self, space: SearchSpace) -> Surveyed:
        work = self.work
        try:
            site_fit = SiteFit.of(self.walk, space.site, self.chosen, work.weights, work.settings.seed, work.watch)
            if not site_fit.reached:
                return Surveyed(space.site, (), reason=UNREACHED)
            structures = work.prepared.structures
            return _SiteSurvey(
                space.site,
                site_fit,
                structures,
                self._evaluator,
                self.effort,
                self.latency_table,
                self.gains,
                work.watch,
            ).survey(space.distinct)
        except FitError as error:
            return Surveyed(space.site, (), reason=error.reason)


@dataclass(frozen=True, slots=True)
class _SiteSurvey:
    """One site, and everything that its options are measured with."""

    site: Site
    site_fit: SiteFit
    structures: Mapping[str, Structure]
    evaluator: Evaluator
    effort: Effort
    latency_table: LatencyTable | None
    gains: _RefinementGains
    stopwatch: Stopwatch

    def survey(self, rank_ranges: Sequence[RankRange]) -> Surveyed:
        curves = [
            Curve(rank_range, tuple(usable(rank_range, self.latency_table))) for rank_range in self._few(rank_ranges)
        ]
        curves = [curve for curve in curves if curve.candidates]
        before: float | None = None
        dropped: list[Dropped] = []
        if self.latency_table is not None:
            with self.stopwatch.timed("latency"):
                before = self.latency_table.original(self.site)
                curves, dropped = self._fast_enough(self._timed(curves), before)
        with self.stopwatch.timed("solves"):
            begun, failed = self._first_fits(curves)
            near, far = competitive(begun)
            near, wild = self._refined(near)
        dropped += [*failed, *wild]
        dropped += [entry for c in far for entry in c.dropped("far behind others of the same cost in a first fit")]
        kept, wrong = faithful_enough(near)
        with self.stopwatch.timed("effects"):
            options = self._scored(kept)
        told = (*dropped, *wrong)
        return Surveyed(self.site, tuple(options), told, before, None if options else _nothing_left(told, rank_ranges))

    @property
    def _large(self) -> bool:
        return self.site_fit.patch >= LARGE

    def _few(self, rank_ranges: Sequence[RankRange]) -> list[RankRange]:
        """All rank ranges; at large sites not every variant of a structure that has many."""
        if not self._large:
            return list(rank_ranges)
        by_structure: dict[tuple[str, str], list[RankRange]] = {}
        for rank_range in rank_ranges:
            by_structure.setdefault((rank_range.rule.name, rank_range.structure.name), []).append(rank_range)
        return [
            group[i - 1]
            for group in by_structure.values()
            for i in between(range(1, len(group) + 1), self._at_least_two(self.effort.large_variants))
        ]

    def _timed(self, curves: Sequence[Curve]) -> list[Curve]:
        """The curves with the seconds of all candidates, which are timed against each other."""
        assert self.latency_table is not None
        timed = iter(self.latency_table.of(self.site, [p for curve in curves for p in curve.candidates]))
        found = [(curve, [next(timed) for _ in curve.candidates]) for curve in curves]
        return [
            replace(curve, candidates=tuple(t.candidate for t in own), seconds=tuple(t.seconds for t in own))
            for curve, own in found
        ]

    def _fast_enough(self, curves: Sequence[Curve], before: float) -> tuple[list[Curve], list[Dropped]]:
        """The curves without the options that save too little measured time, and these."""
        kept: list[Curve] = []
        dropped: list[Dropped] = []
        for curve in curves:
            assert self.latency_table is not None
            least = least_of(curve.rank_range.rule, self.latency_table.least_gain)
            pairs = list(zip(curve.candidates, curve.seconds, strict=True))
            fast = [candidate for candidate, seconds in pairs if gains(seconds, before, least)]
            kept += [curve.only(fast)] if fast else []
            dropped += [
                Dropped(p, None, _too_slow(seconds, before, least), seconds) for p, seconds in pairs if p not in fast
            ]
        return kept, dropped

    def _first_fits(self, curves: Sequence[Curve]) -> tuple[list[Curve], list[Dropped]]:
        """Some ranks of every curve, fitted without refinement; at large sites by rough fits in float32, with the part of their
        unexplained variance that refinement is expected to leave. Also those that cannot be fitted."""
        if not self._large:
            picked = [self._picked(curve, self.effort.ranks) for curve in curves]
            return self._fitted(curves, picked, lambda s, o: partial(self.site_fit.fit, s, o, 0))
        picked = [self._picked(curve, self._at_least_two(self.effort.large_ranks)) for curve in curves]
        goals = [goal.to(torch.float32) for goal in self.site_fit.goals]
        rough, failed = self._fitted(curves, picked, lambda s, o: partial(self.site_fit.rough, s, o, goals))
        left = [self.gains.expected(curve.rank_range.structure.name) for curve in rough]
        return [
            replace(curve, samples=tuple(replace(sample, remaining=part) for sample in curve.samples))
            for curve, part in zip(rough, left, strict=True)
        ], failed

    def _picked(self, curve: Curve, count: int) -> list[Candidate]:
        """``count`` of a curve's candidates."""
        ranks = {int(p.option.parameters["rank"]): p for p in curve.candidates}
        return [ranks[rank] for rank in (between if self._large else spread)(sorted(ranks), count)]

    def _refined(self, curves: Sequence[Curve]) -> tuple[list[Curve], list[Dropped]]:
        """The same samples, refined as far as it pays, and those that cannot be refined; the gains are learned."""
        iterations = self._iterations
        if iterations == 0 or not self.site_fit.seen:
            return list(curves), []
        rough = {sample.candidate.option: sample.fit for curve in curves for sample in curve.samples}

        def fitting(structure: Structure, option: Option) -> Callable[[], Fit]:
            if self._large:
                return partial(self.site_fit.go_on, structure, option, rough[option], iterations)
            return partial(self.site_fit.fit, structure, option, iterations)

        refined, failed = self._fitted(curves, [[s.candidate for s in curve.samples] for curve in curves], fitting)
        for sample in (sample for curve in refined for sample in curve.samples):
            first, structure = rough[sample.candidate.option], sample.candidate.option.structure
            if first.unexplained > 0 and not self._large:
                self.gains.learn(structure, sample.fit.unexplained / first.unexplained)
        return refined, failed

    def _fitted(
        self, curves: Sequence[Curve], picked: Sequence[Sequence[Candidate]], fitting: _Fitting
    ) -> tuple[list[Curve], list[Dropped]]:
        """The curves with these candidates of each fitted as their samples, all side by side; and those that cannot be fitted,
        which the curves lose. Raises FitError where nothing can be fitted."""
        each = [candidate for candidates in picked for candidate in candidates]
        tasks = [fitting(self.structures[p.option.structure], p.option) for p in each]
        fits = iter(self.site_fit.tried(tasks))
        kept, failed = list[Curve](), list[Dropped]()
        for curve, candidates in zip(curves, picked, strict=True):
            found = [(candidate, next(fits)) for candidate in candidates]
            errors = [(candidate, fit) for candidate, fit in found if isinstance(fit, FitError)]
            failed += [Dropped(p, None, error.reason, curve.seconds_of(p)) for p, error in errors]
            samples = tuple(FittedCandidate(p, fit) for p, fit in found if not isinstance(fit, FitError))
            if samples:
                left = [p for p in curve.candidates if p not in [wrong for wrong, _ in errors]]
                kept.append(replace(curve, samples=samples).only(left))
        return kept, failed

    @property
    def _iterations(self) -> int:
        """Iterations of refinement for each fit of this site. The cost of one grows with the square of the patch, and its gain
        only serves a comparison. None at large sites, unless more than the least effort is cheap there."""
        most = self.effort.iterations
        if self._large:
            return self.site_fit.effort(self.effort.large_iterations) if self._cheap else 0
        return 0 if most == 0 else max(min(3, most), min(most, REFINABLE // self.site_fit.patch))

    @property
    def _cheap(self) -> bool:
        """Whether a fit of a large site takes little time compared with gathering its inputs, so that more than the least effort
        is worth it."""
        return self.site_fit.effort(self.effort.large_iterations) > self.site_fit.effort(0)

    def _at_least_two(self, count: int) -> int:
        """How many ranks or variants of a large site are fitted: at least two where fits are cheap, as one alone says nothing
        about the others."""
        return max(2, count) if self._cheap else count

    def _scored(self, curves: Sequence[Curve]) -> list[Scored]:
        """All options, scored by effects that are measured on the best variant of each structure: equal errors do about equal
        harm, most nearly so within one structure. Where all effects together take long, they are measured on the best variant of
        all."""
        groups = ([list(curves)] if curves else []) if self.evaluator.dear else _by_structure(curves)
        return [scored for group in groups for scored in self._scored_alike(group)]

    def _scored_alike(self, curves: Sequence[Curve]) -> list[Scored]:
        best = min(curves, key=lambda curve: statistics.fmean(unexplained for _, unexplained in curve.points))
        picked = spread(range(1, len(best.samples) + 1), self._measured)
        effects = [(best.samples[i - 1], self._effect(best.samples[i - 1])) for i in picked]
        return [scored for curve in curves for scored in curve.scored(effects)]

    @property
    def _measured(self) -> int:
        """How many effects are measured per structure: fewer where a run of the model takes seconds. One is too few: on a
        ResNet-20 at a quarter of the MACs the KL rose from 0.031 to 0.051."""
        return min(self.effort.measured, 2) if self.evaluator.long else self.effort.measured

    def _effect(self, sample: FittedCandidate) -> float:
        option = sample.candidate.option
        with torch.no_grad():
            module = self.site_fit.merged(self.structures[option.structure], option, sample.fit)
            return self.evaluator.effect(self.site, module)


def _by_structure(curves: Sequence[Curve]) -> list[list[Curve]]:
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.rank_range.structure.name, []).append(curve)
    return list(found.values())


def _too_slow(seconds: float, before: float, least: float) -> str:
    if seconds == math.inf:
        return "cannot run there"
    changed = change_told(seconds / before - 1, least)
    return (
        f"{changed}, less than the {100 * least:g}% it must gain"
        if least > 0
        else f"{changed}: slower than what it replaces"
    )


def _nothing_left(dropped: Sequence[Dropped], rank_ranges: Sequence[RankRange]) -> str:
    """Why a site has no option, though its rules allow these rank ranges."""
    if not dropped:
        least = min(rank_range.rule.require.min_mac_saving for rank_range in rank_ranges)
        return f"no option saves {100 * least:g} % of its MACs, which its rule asks for"
    # Of options that were not timed, or take equally long, the one that does least harm.
    best = min(dropped, key=lambda one: (one.seconds or math.inf, math.inf if one.error is None else one.error))
    return f"no option is left; the best, {best.candidate.option.describe()}, {best.reason}"
