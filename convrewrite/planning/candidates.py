"""Which candidates of a rank range are considered: where time is measured, a few that fill channel blocks, or a part of the
first; otherwise nearly all."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from convrewrite.machine import channel_block
from convrewrite.planning.curves import spread
from convrewrite.planning.latency_table import LatencyTable, aligned, calls_of
from convrewrite.rewriting import Prepared
from convrewrite.rules import Candidate, RankRange, shortlist_of
from convrewrite.runtime import OptionsAt

LEAST_RATIO = 0.03
"""Options that cost less than this part of a site's own MACs are not sampled."""

RANKS = 256
"""At most this many ranks of a rank range may be chosen from; neighbours then differ by about two percent in cost."""

TIMED = 6
"""At most this many ranks of a rank range are timed where speed counts; fewer of them are fitted."""


PARTS = 2
"""At most this many ranks that fill a quarter or a half of one block are timed besides."""

DEAR_BLOCK = 0.2
"""These are timed where the first whole block costs more than this part of a site's own MACs; elsewhere it is little enough."""


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The ranks of one rank range."""

    rank_range: RankRange
    usable: Sequence[int]

    def timed(self, block: int) -> list[int]:
        """A few ranks that fill channel blocks, or any if none does; and a few that fill a part of the first block: these waste
        the rest of it, but nothing else takes as little time."""
        full = spread(self._filling(block, self.usable) or self.usable, TIMED)
        if not full or self.rank_range.at(full[0]).cost.macs <= DEAR_BLOCK * self.rank_range.site.cost.macs:
            return full
        lower = [rank for rank in self.usable if 2 * rank <= full[0]]
        return [*spread(self._filling(max(1, block // 4), lower), PARTS), *full]

    def _filling(self, block: int, ranks: Sequence[int]) -> list[int]:
        structure, spec = self.rank_range.structure, self.rank_range.site.folded_spec.per_group
        settings = ({**self.rank_range.variant, "rank": rank} for rank in ranks)
        return [int(setting["rank"]) for setting in settings if aligned(structure.stages(spec, setting), block)]


def usable(rank_range: RankRange, latency_table: LatencyTable | None) -> list[Candidate]:
    """The ranks that may be chosen: all that save enough; where speed counts, a few of them, see :meth:`_Ranks.timed`."""
    site = rank_range.site
    limit = (1 - rank_range.rule.require.min_mac_saving) * site.cost.macs
    ranks = rank_range.ranks
    last = bisect.bisect_right(ranks, limit, key=lambda rank: rank_range.at(rank).cost.macs)
    lowest = LEAST_RATIO * site.cost.macs
    first = bisect.bisect_left(ranks, lowest, hi=last, key=lambda rank: rank_range.at(rank).cost.macs)
    found = _Ranks(rank_range, ranks[min(first, max(0, last - 1)) : last])
    if latency_table is None:
        return [rank_range.at(rank) for rank in spread(found.usable, RANKS)]
    chosen = found.timed(latency_table.block or channel_block())
    if latency_table.least_gain == 0:  # counts matter: ranks between blocks may be the best ones that are not slower
        chosen = sorted({*chosen, *spread(found.usable, TIMED)})
    return [rank_range.at(rank) for rank in chosen]


def to_time(prepared: Prepared, latency_table: LatencyTable) -> tuple[OptionsAt, ...]:
    """Every option whose time a plan by these rules may need, for any budget, at every geometry: another machine is to time
    them."""
    latency_table = replace(latency_table, least_gain=0.0)
    found: dict[tuple[object, object], OptionsAt] = {}
    for space in prepared.search_spaces:
        candidates = [c for rank_range in space.rank_ranges for c in usable(rank_range, latency_table)]
        candidates += shortlist_of(space).candidates if space.rank_ranges else ()
        graphs = latency_table.graphs(space.site, candidates) if candidates else []
        for size in calls_of(space.site) if graphs else ():
            key = (space.site.folded_spec, size)
            known = found[key].options if key in found else ()
            found[key] = OptionsAt(space.site.folded_spec, size, tuple(dict.fromkeys((*known, *graphs))))
    return tuple(found.values())
