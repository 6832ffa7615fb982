"""The latency table: measured seconds of candidates at their site's real input shape, and what follows from them: the fastest
lowering of a candidate, and which candidates are too slow to stay. Also which ranks fill the processor's channel blocks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from convrewrite.conv import ConvSpec, Size
from convrewrite.graph import Site
from convrewrite.rules import Candidate, Rule, Shortlist, cost_of
from convrewrite.runtime import THIS_MACHINE, OptionGraph, Timer
from convrewrite.structures import Option, Stage, Structure, branch_specs, lowerings
from convrewrite.values import beside

MIN_GAIN = 0.05
"""An option that saves less than this part of a site's measured time is not worth its error."""


@dataclass(frozen=True, slots=True)
class TimedCandidate:
    """A candidate in the lowering that runs fastest, the seconds that it takes for one example, and those of the original."""

    candidate: Candidate
    seconds: float
    original: float

    @property
    def gain(self) -> float:
        """The part of the original's time that is saved; negative for an option that is slower."""
        return 1 - self.seconds / self.original


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """The seconds of candidates, as a timer measures them at one thread count. ``block``: channels that the runtime works on at a
    time. ``least_gain``: part of a site's time that an option must save, unless its rule sets its own; None: options may be
    slower."""

    structures: Mapping[str, Structure]
    threads: int = 1
    rounds: int = 9
    timer: Timer = THIS_MACHINE
    block: int | None = None
    least_gain: float | None = MIN_GAIN

    def of(self, site: Site, candidates: Sequence[Candidate]) -> tuple[TimedCandidate, ...]:
        """Every candidate of a site with its seconds, all calls of the site together."""
        variants = [(p, lowering) for p in candidates for lowering in self._lowerings(site.folded_spec, p.option)]
        graphs = [self._graph(site.folded_spec, p.option, lowering) for p, lowering in variants]
        before, after = self._seconds(site, graphs)
        fastest: dict[Option, tuple[float, str]] = {}
        for (candidate, lowering), seconds in zip(variants, after, strict=True):
            fastest[candidate.option] = min(fastest.get(candidate.option, (seconds, lowering)), (seconds, lowering))
        return tuple(self._timed(site, p, *fastest[p.option], before) for p in candidates)

    def graphs(self, site: Site, candidates: Sequence[Candidate]) -> list[OptionGraph]:
        """The candidates as graphs, in all their lowerings."""
        spec = site.folded_spec
        return [
            self._graph(spec, c.option, lowering) for c in candidates for lowering in self._lowerings(spec, c.option)
        ]

    def original(self, site: Site) -> float:
        """Seconds of the site as it is, all calls together."""
        return self._seconds(site, [])[0]

    def saving(self, site: Site, candidate: Candidate) -> float:
        """Seconds saved at a site by a candidate in the lowering that it has; negative when it is slower."""
        graph = self._graph(site.folded_spec, candidate.option, candidate.option.lowering)
        before, after = self._seconds(site, [graph])
        return before - after[0]

    def _timed(self, site: Site, candidate: Candidate, seconds: float, lowering: str, before: float) -> TimedCandidate:
        option = replace(candidate.option, lowering=lowering)
        cost = cost_of(site, option, self.structures[option.structure])
        return TimedCandidate(replace(candidate, option=option, cost=cost), seconds, before)

    def _seconds(self, site: Site, graphs: Sequence[OptionGraph]) -> tuple[float, list[float]]:
        before, after = 0.0, [0.0] * len(graphs)
        for size, calls in calls_of(site).items():
            once, options = self.timer.time_options(site.folded_spec, graphs, size, self.threads, self.rounds)
            before += calls * once
            after = [total + calls * seconds for total, seconds in zip(after, options, strict=True)]
        return before, after

    def _lowerings(self, spec: ConvSpec, option: Option) -> tuple[str, ...]:
        return lowerings(self._stages(spec, option))

    def _graph(self, spec: ConvSpec, option: Option, lowering: str) -> OptionGraph:
        return branch_specs(spec, self._stages(spec, option), lowering)

    def _stages(self, spec: ConvSpec, option: Option) -> tuple[Stage, ...]:
        return self.structures[option.structure].stages(spec.per_group, option.parameters)


def calls_of(site: Site) -> dict[Size, int]:
    """How often a site is called with each size."""
    counted: dict[Size, int] = {}
    for size in site.input_sizes:
        counted[size] = counted.get(size, 0) + 1
    return counted


def in_fastest_lowering(shortlists: Sequence[Shortlist], latency_table: LatencyTable) -> tuple[Shortlist, ...]:
    """The same options, each in the lowering that runs fastest at its site."""
    return tuple(_with(shortlist, _timed(shortlist, latency_table)) for shortlist in shortlists)


def fast_enough(shortlists: Sequence[Shortlist], latency_table: LatencyTable) -> tuple[Shortlist, ...]:
    """As above, without the options that cannot run, are slower than their site, or miss their rule's ``min_latency_gain``. Of
    the table's own ``least_gain`` only this counts: if it is None, options may be slower."""
    least = None if latency_table.least_gain is None else 0.0
    return tuple(_without_slow(shortlist, _timed(shortlist, latency_table), least) for shortlist in shortlists)


def least_of(rule: Rule, least_gain: float | None) -> float:
    """The part of a site's time that an option of a rule must gain."""
    asked = rule.require.min_latency_gain
    if asked is not None:
        return asked
    return -math.inf if least_gain is None else least_gain


def gains(seconds: float, before: float, least_gain: float) -> bool:
    """Whether an option saves this part of its site's time; one that takes forever cannot run, and is never taken."""
    return math.isfinite(seconds) and 1 - seconds / before >= least_gain


def change_told(change: float, least_gain: float) -> str:
    """How an option that is too slow changes the time of its site, a part of it: in as many digits as show that it gains less
    than it must, and never by ``-0%``."""
    percent = beside(-100 * least_gain, 100 * change, ".0f")
    shown = percent if float(percent) < 0 else "+" + percent.lstrip("-")
    return f"changes the measured time by {shown}%"


def _timed(shortlist: Shortlist, latency_table: LatencyTable) -> tuple[TimedCandidate, ...]:
    return latency_table.of(shortlist.site, shortlist.candidates) if shortlist.candidates else ()


def _with(shortlist: Shortlist, timed: Sequence[TimedCandidate]) -> Shortlist:
    return replace(shortlist, candidates=tuple(entry.candidate for entry in timed))


def _without_slow(shortlist: Shortlist, timed: Sequence[TimedCandidate], least_gain: float | None) -> Shortlist:
    kept = [t for t in timed if gains(t.seconds, t.original, least_of(t.candidate.rule, least_gain))]
    if kept or not timed:
        return _with(shortlist, kept)
    best = max(timed, key=lambda entry: entry.gain)
    if best.seconds == math.inf:
        return Shortlist(shortlist.site, (), "no option can run there")
    told = change_told(-best.gain, least_of(best.candidate.rule, least_gain))
    return Shortlist(shortlist.site, (), f"no option is fast enough: the best {told}")


def aligned(stages: Sequence[Stage], block: int) -> bool:
    """Whether the chain fills channel blocks of this size: the channels between its stages are a multiple of it, and so are those
    of each group of a stage, unless it is depthwise."""
    between = all(stage.out_channels % block == 0 for stage in stages[:-1])
    return between and all(_fills(stage, block) for stage in stages)


def _fills(stage: Stage, block: int) -> bool:
    if stage.groups == 1 or stage.groups in (stage.in_channels, stage.out_channels):
        return True
    return stage.in_channels // stage.groups % block == 0 and stage.out_channels // stage.groups % block == 0
