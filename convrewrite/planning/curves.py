"""Errors and effects of a site's options, interpolated between a few that were measured, as curves over the cost."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from convrewrite.fitting import Fit
from convrewrite.graph import Site
from convrewrite.planning.costs import Counted, Timed
from convrewrite.rules import Candidate, RankRange

FAR_BEHIND = 1.5
"""A rank range is dropped if, at every cost, its first fits leave more than this many times the variance unexplained that another
range leaves."""

LEAST_UNEXPLAINED = 1e-12
"""Fits that leave less than this share of a variance count as equally good: so every share has a logarithm."""

LEAST_EFFECT = 1e-12
"""Options of a smaller effect count as equally harmless: so every effect has a logarithm."""

MOST_EFFECT = 1e6
"""Options of a larger effect, or with outputs that are not numbers any more, count as equally harmful: so effects add up."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its relative output error, its effect on the model's outputs (KL in nats, or relative squared
    error), and whether that effect was measured or interpolated."""

    candidate: Candidate
    error: float
    effect: float
    measured: bool

    @property
    def costs(self) -> Counted:
        """Its cost in every resource."""
        return Counted(self.candidate.cost)

    def timed(self, seconds: float) -> "TimedScored":
        """The same with the seconds that were measured."""
        return TimedScored(self.candidate, self.error, self.effect, self.measured, seconds)


@dataclass(frozen=True, slots=True)
class TimedScored(Scored):
    """The same, with the measured seconds of the candidate at its site."""

    seconds: float

    @property
    def costs(self) -> Counted:
        """Its cost in every resource, including seconds."""
        return Timed(self.candidate.cost, self.seconds)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A candidate that was timed or fitted, with its relative output error, and the reason why it is not among the options."""

    candidate: Candidate
    error: float | None
    reason: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Surveyed:
    """All that a site could become; ``seconds`` are those of the site as it is. ``reason`` says why there are no options.

    ``must_change``: the site may not be kept as it is.
    """

    site: Site
    options: tuple[Scored, ...]
    dropped: tuple[Dropped, ...] = ()
    seconds: float | None = None
    reason: str | None = None
    must_change: bool = False


@dataclass(frozen=True, slots=True)
class FittedCandidate:
    """A rank of a rank range that was fitted; ``remaining`` is the part of its unexplained variance that full refinement is
    expected to leave, 1 where nothing is gained."""

    candidate: Candidate
    fit: Fit
    remaining: float = 1.0

    @property
    def unexplained(self) -> float:
        """The share of the output's variance that the finished fit is expected to leave unexplained."""
        return max(LEAST_UNEXPLAINED, self.fit.unexplained * self.remaining)

    @property
    def error(self) -> float:
        """The relative output error that the finished fit is expected to have."""
        return self.unexplained**0.5


@dataclass(frozen=True, slots=True)
class Curve:
    """A rank range with the ranks that may be chosen, from cheap to expensive, their seconds where time counts, and its fitted
    samples.

    The logarithm of the share of the output's variance that a fit leaves unexplained is interpolated.
    """

    rank_range: RankRange
    candidates: tuple[Candidate, ...]
    seconds: tuple[float, ...] = ()
    samples: tuple[FittedCandidate, ...] = ()

    @property
    def points(self) -> list[tuple[float, float]]:
        """What the samples leave unexplained over their cost (seconds where time counts, otherwise MACs), both as logarithms."""
        return sorted((self.log_cost(sample.candidate), math.log(sample.unexplained)) for sample in self.samples)

    def log_cost(self, candidate: Candidate) -> float:
        """The logarithm of what a candidate of this rank range costs."""
        if self.seconds:
            return math.log(self.seconds[self.candidates.index(candidate)])
        return _log_macs(candidate)

    def seconds_of(self, candidate: Candidate) -> float | None:
        """Its seconds, where time counts."""
        return self.seconds[self.candidates.index(candidate)] if self.seconds else None

    def only(self, kept: Sequence[Candidate]) -> "Curve":
        """The curve of these candidates alone, without the samples of others."""
        pairs = [(p, self.seconds_of(p)) for p in self.candidates if p in kept]
        samples = tuple(sample for sample in self.samples if sample.candidate in kept)
        seconds = tuple(s for _, s in pairs if s is not None)
        return replace(self, candidates=tuple(p for p, _ in pairs), seconds=seconds, samples=samples)

    def error_of(self, candidate: Candidate) -> float:
        """The relative output error of a candidate, interpolated."""
        return self._unexplained_of(candidate) ** 0.5

    def scored(self, effects: Sequence[tuple[FittedCandidate, float]]) -> list[Scored]:
        """All candidates with their errors, and their effects interpolated between the measured ones.

        An effect was measured on a sample as it was fitted then; beyond the measured ones it is proportional to the unexplained
        share.
        """
        known = sorted(
            (math.log(max(LEAST_UNEXPLAINED, sample.fit.unexplained)), math.log(bounded(effect)))
            for sample, effect in effects
        )
        measured = {sample.candidate.option for sample, _ in effects if sample.remaining == 1.0}
        found = []
        for candidate in self.candidates:
            unexplained, seconds = self._unexplained_of(candidate), self.seconds_of(candidate)
            effect = math.exp(min(math.log(MOST_EFFECT), interpolated(known, math.log(unexplained), 1.0)))
            scored = Scored(candidate, unexplained**0.5, effect, candidate.option in measured)
            found.append(scored if seconds is None else scored.timed(seconds))
        return found

    def dropped(self, reason: str) -> list[Dropped]:
        """Every sample as dropped, all for the same reason."""
        return [Dropped(s.candidate, s.error, reason, self.seconds_of(s.candidate)) for s in self.samples]

    def _unexplained_of(self, candidate: Candidate) -> float:
        """The share that a candidate leaves unexplained, log-log in the MACs."""
        shares = sorted((_log_macs(sample.candidate), math.log(sample.unexplained)) for sample in self.samples)
        return math.exp(interpolated(shares, _log_macs(candidate), -1.0))


def bounded(effect: float) -> float:
    """An effect, limited to the range in which options are compared."""
    return min(MOST_EFFECT, max(LEAST_EFFECT, effect))


def competitive(curves: Sequence[Curve]) -> tuple[list[Curve], list[Curve]]:
    """The curves that come near the best one at some cost, and the remaining ones."""
    near: list[Curve] = []
    far: list[Curve] = []
    for curve in curves:
        others = [other.points for other in curves if other is not curve]
        good = (
            all(unexplained <= interpolated(other, cost, -1.0) + math.log(FAR_BEHIND) for other in others)
            for cost, unexplained in curve.points
        )
        (near if any(good) else far).append(curve)
    return near, far


def faithful_enough(curves: Sequence[Curve]) -> tuple[list[Curve], list[Dropped]]:
    """The curves without options whose output error their rule does not allow, and those of the options left out that were
    fitted."""
    kept: list[Curve] = []
    dropped: list[Dropped] = []
    for curve in curves:
        most = curve.rank_range.rule.require.max_output_error or math.inf
        good = [candidate for candidate in curve.candidates if curve.error_of(candidate) <= most]
        # All samples stay: the remaining candidates are interpolated between them.
        kept += [replace(curve.only(good), samples=curve.samples)] if good else []
        wrong = curve.only([candidate for candidate in curve.candidates if candidate not in good])
        dropped += wrong.dropped(f"its output error exceeds {most:.3g}, the rule's limit")
    return kept, dropped


def spread(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of ascending numbers, including both ends, evenly spaced in the logarithm."""
    if len(values) <= count:
        return list(values)
    if count == 1:
        return [values[len(values) // 2]]
    wanted = (values[0] * (values[-1] / values[0]) ** (i / (count - 1)) for i in range(count))
    return _nearest(values, wanted)


def between(values: Sequence[int], count: int) -> list[int]:
    """As :func:`spread`, without the ends: the middles of ``count`` equal stretches of the logarithm."""
    if len(values) <= count:
        return list(values)
    wanted = (values[0] * (values[-1] / values[0]) ** ((i + 0.5) / count) for i in range(count))
    return _nearest(values, wanted)


def _nearest(values: Sequence[int], wanted: Iterable[float]) -> list[int]:
    """The value nearest to each wanted number, the smaller of two; each value once."""
    return list(dict.fromkeys(min(values, key=lambda value: (abs(value - w), value)) for w in wanted))


def interpolated(points: Sequence[tuple[float, float]], x: float, slope: float) -> float:
    """Piecewise linear through points sorted by x, with this slope beyond the ends."""
    if x <= points[0][0]:
        return points[0][1] + slope * (x - points[0][0])
    if x >= points[-1][0]:
        return points[-1][1] + slope * (x - points[-1][0])
    index = bisect.bisect_right([p[0] for p in points], x)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1


def _log_macs(candidate: Candidate) -> float:
    return math.log(max(1, candidate.cost.macs))
