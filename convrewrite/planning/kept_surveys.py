"""Surveys of sites that are kept from run to run: a budget decides what is chosen from a survey, but changes nothing in it.

A site's survey depends on the run's context (:mod:`convrewrite.rewriting.kept_fits`), on what the rules allow there, on how much
is measured, on which sites are surveyed, on the gains of refinement known before it, and, where speed counts, on the machine and
on how much time an option must gain. Its seconds are those of the speed that the machine had: they are compared with others of
another run, or of another process, and are therefore converted to the speed that it has there (:func:`_restored`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from convrewrite.planning.costs import seconds_of
from convrewrite.planning.curves import Dropped, Scored, Surveyed
from convrewrite.planning.effort import Effort
from convrewrite.planning.latency_table import LatencyTable
from convrewrite.rewriting import keepable
from convrewrite.rules import Candidate, RankRange, SearchSpace, cost_of
from convrewrite.stored import RunCache
from convrewrite.structures import lowerings

Gains = Mapping[str, Sequence[float]]
"""The part of the unexplained variance of first fits that refinement left, by structure, in the order it was learned."""

NotNegative = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Reason = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Named(_Part):
    """A candidate by the position of its rank range at the site, its rank and its lowering."""

    range: int = Field(ge=0)
    rank: int = Field(ge=1)
    lowering: str
    seconds: Seconds | None = None


class _Option(_Named):
    error: NotNegative
    effect: NotNegative
    measured: bool


class _Dropped(_Named):
    """``runs``: false for an option that the runtime cannot run, whose time is infinite."""

    error: NotNegative | None
    reason: Reason
    runs: bool = True


class _Kept(_Part):
    """The survey of one site, and the gains of refinement known after it."""

    options: list[_Option]
    dropped: list[_Dropped]
    seconds: Seconds | None
    reason: Reason | None
    gains: dict[str, list[Annotated[float, Field(ge=0, le=1)]]]


@dataclass(frozen=True, slots=True)
class KeptSurveys:
    """The surveys of one run; ``asked``: the part of their keys that all share. ``table``: where speed counts, the times of this
    run. ``keeps``: whether they are kept at all, as times must be those of a machine that can be named."""

    cache: RunCache
    asked: tuple[Any, ...]
    table: LatencyTable | None
    keeps: bool

    @classmethod
    def of(
        cls, cache: RunCache, effort: Effort, latency_table: LatencyTable | None, active: Sequence[str]
    ) -> "KeptSurveys":
        """``effort`` is how much is measured."""
        table = latency_table
        lasting = "" if table is None else getattr(table.timer, "lasting", "")
        times = None if table is None else (table.threads, table.rounds, table.block, lasting, table.least_gain)
        keeps = table is None or bool(lasting)
        return cls(cache, (asdict(effort), times, list(active)), table, keeps)

    def find(self, space: SearchSpace, gains: Gains) -> tuple[Surveyed, Gains] | None:
        """The survey of this site and the gains known after it, if they are kept and match what the rules allow there."""
        entry = self.cache.get("survey", self._asked(space, gains)) if self._keeps(space) else None
        if entry is None or entry.tensors:
            return None
        try:
            kept = _Kept.model_validate(entry.facts)
            return _restored(space, kept, self.table), kept.gains
        except (ValueError, LookupError):  # pydantic's ValidationError is a ValueError
            return None

    def keep(self, space: SearchSpace, gains: Gains, found: Surveyed, behind: Gains) -> None:
        """Keep the survey of a site: ``gains`` are those known before it, ``behind`` those after it."""
        if not self._keeps(space):
            return
        facts = _facts(space, found)
        self.cache.put("survey", self._asked(space, gains), facts | {"gains": _plain(behind)}, {})

    def _asked(self, space: SearchSpace, gains: Gains) -> tuple[Any, ...]:
        ranges = [
            (
                r.rule.name,
                r.rule.require.model_dump(),
                r.structure.name,
                sorted(r.variant.items()),
                repr(r.ranks) if isinstance(r.ranks, range) else list(r.ranks),
            )
            for r in space.rank_ranges
        ]
        return (*self.asked, space.site.name, ranges, _plain(gains))

    def _keeps(self, space: SearchSpace) -> bool:
        return self.keeps and keepable([rank_range.structure for rank_range in space.rank_ranges])


def survey_facts(spaces: Sequence[SearchSpace], surveyed: Sequence[Surveyed]) -> list[dict[str, Any] | None]:
    """A whole survey as plain values, for another process that has the same search spaces; None for sites without options."""
    pairs = zip(spaces, surveyed, strict=True)
    return [_facts(space, found) | {"gains": {}} if space.rank_ranges else None for space, found in pairs]


def survey_of_facts(
    spaces: Sequence[SearchSpace], facts: Sequence[object], table: LatencyTable
) -> tuple[Surveyed, ...]:
    """The survey that such values describe; ``table``: the times of this process, which is asked for none where the survey has
    none. Raises ValueError and LookupError for what these search spaces cannot have."""
    found = []
    for space, told in zip(spaces, facts, strict=True):
        if told is None:
            found.append(Surveyed(space.site, (), reason=space.reason))
        else:
            kept = _Kept.model_validate(told)
            found.append(_restored(space, kept, None if kept.seconds is None else table))
    return tuple(found)


def _facts(space: SearchSpace, found: Surveyed) -> dict[str, Any]:
    """The fields of a :class:`_Kept` except the gains."""
    options = [
        {
            "error": s.error,
            "effect": s.effect,
            "measured": s.measured,
            **_named(space, s.candidate, seconds_of(s.costs)),
        }
        for s in found.options
    ]
    dropped = [_left_out(space, entry) for entry in found.dropped]
    return {"options": options, "dropped": dropped, "seconds": found.seconds, "reason": found.reason}


def _left_out(space: SearchSpace, entry: Dropped) -> dict[str, object]:
    """The fields of a :class:`_Dropped`; JSON has no infinite seconds."""
    runs = entry.seconds is None or isfinite(entry.seconds)
    named = _named(space, entry.candidate, entry.seconds if runs else None)
    return {"error": entry.error, "reason": entry.reason, "runs": runs, **named}


def _restored(space: SearchSpace, kept: _Kept, table: LatencyTable | None) -> Surveyed:
    """The survey of a site as it was kept; its times as ratios to the site's own, which ``table`` has at the machine's speed now:
    a machine that is busy today is slower at everything. Raises ValueError and LookupError for what the site cannot have."""
    times = [kept.seconds, *(option.seconds for option in kept.options)]
    if any((seconds is None) != (table is None) for seconds in times) or bool(kept.options) == bool(kept.reason):
        raise ValueError("expected the times of all options or of none, and a reason where there is none")
    options, dropped, speed, before = [], [], 1.0, kept.seconds
    if table is not None and kept.seconds is not None:
        before = table.original(space.site)
        speed = before / kept.seconds
    for told in kept.options:
        scored = Scored(_candidate(space, told), told.error, told.effect, told.measured)
        options.append(scored if told.seconds is None else scored.timed(speed * told.seconds))
    for left in kept.dropped:
        seconds = inf if not left.runs else None if left.seconds is None else speed * left.seconds
        dropped.append(Dropped(_candidate(space, left), left.error, left.reason, seconds))
    return Surveyed(space.site, tuple(options), tuple(dropped), before, kept.reason)


def _named(space: SearchSpace, candidate: Candidate, seconds: float | None) -> dict[str, object]:
    """The fields of a :class:`_Named`."""
    rank = int(candidate.option.parameters["rank"])
    position = next(i for i, rank_range in enumerate(space.rank_ranges) if _of(rank_range, candidate))
    return {"range": position, "rank": rank, "lowering": candidate.option.lowering, "seconds": seconds}


def _of(rank_range: RankRange, candidate: Candidate) -> bool:
    option = candidate.option
    variant = {name: value for name, value in option.parameters.items() if name != "rank"}
    return (
        rank_range.rule is candidate.rule
        and rank_range.structure.name == option.structure
        and dict(rank_range.variant) == variant
    )


def _candidate(space: SearchSpace, told: _Named) -> Candidate:
    """The candidate that is named; raises LookupError for one that does not exist."""
    rank_range = space.rank_ranges[told.range]
    if told.rank not in rank_range.ranks:
        raise LookupError(told.rank)
    candidate, structure = rank_range.at(told.rank), rank_range.structure
    if candidate.option.lowering == told.lowering:
        return candidate
    stages = structure.stages(space.site.folded_spec.per_group, candidate.option.parameters)
    if told.lowering not in lowerings(stages):
        raise LookupError(told.lowering)
    option = replace(candidate.option, lowering=told.lowering)
    return replace(candidate, option=option, cost=cost_of(space.site, option, structure))


def _plain(gains: Gains) -> dict[str, list[float]]:
    return {name: list(ratios) for name, ratios in gains.items()}
