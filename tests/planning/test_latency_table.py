"""What options cost in time, by clocks that lie."""

from pathlib import Path

import pytest
import torch
from clocks import FalseTimer, by_macs, macs_of
from networks import CalledTwice, settled
from torch import nn

from convrewrite.conv import Size
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.planning.latency_table import LatencyTable, aligned
from convrewrite.rules.options import Candidate, cost_of, search_spaces
from convrewrite.rules.schema import Protect, Rule
from convrewrite.runtime import latency, timing
from convrewrite.runtime.latency import ONNXRUNTIME
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.timing import RuntimeTimer
from convrewrite.runtime.timing_cache import TimingCache
from convrewrite.structures.structure import Stage, Structure
from convrewrite.targets import Clock, OnnxRuntime

FREE = Protect(stem=False, min_channels=0, min_mac_share=0)


def candidates_at(
    model: nn.Module, name: str, structures: dict[str, Structure], rank: int, *names: str
) -> tuple[Site, list[Candidate]]:
    """A site, and the candidate of this rank of every rank range of some structures."""
    sites = find_sites(model, (torch.zeros(1, 3, 16, 16),), trace(model))
    rule = Rule(name="r", structures=names, protect=FREE)
    [space] = [space for space in search_spaces(sites, [rule], structures) if space.site.name == name]
    return space.site, [rank_range.at(rank) for rank_range in space.rank_ranges]


def pair() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)).eval()


@pytest.mark.parametrize("fastest", ["branches", "chain"])
def test_the_lowering_that_runs_fastest_is_chosen_and_timed(fastest: str, structures: dict[str, Structure]) -> None:
    timer = FalseTimer(seconds=lambda graph, _size: 2.0 if (len(graph) == 1) == (fastest == "chain") else 5.0)
    site, candidates = candidates_at(pair(), "1", structures, 3, "separable")
    found = LatencyTable(structures, timer=timer).of(site, candidates)
    assert len(timer.asked) == 2 * len(candidates), "each in both lowerings"
    for timed, candidate in zip(found, candidates, strict=True):
        assert timed.candidate.option.setting == candidate.option.setting
        assert timed.candidate.option.lowering == fastest
        assert timed.seconds == 2.0
        assert timed.candidate.cost == cost_of(site, timed.candidate.option, structures["separable"])
        assert timed.candidate.rule == candidate.rule


def test_of_equal_lowerings_always_the_same_is_taken(structures: dict[str, Structure]) -> None:
    timer = FalseTimer(seconds=lambda _graph, _size: 1.0)
    site, candidates = candidates_at(pair(), "1", structures, 2, "separable")
    assert {
        timed.candidate.option.lowering for timed in LatencyTable(structures, timer=timer).of(site, candidates)
    } == {"branches"}


def test_what_has_one_lowering_keeps_it(structures: dict[str, Structure]) -> None:
    timer = FalseTimer()
    site, candidates = candidates_at(pair(), "1", structures, 4, "channel", "asymmetric", "tucker")
    found = LatencyTable(structures, timer=timer).of(site, candidates)
    assert [timed.candidate for timed in found] == candidates
    assert len(timer.asked) == len(candidates)
    for timed in found:
        assert timed.seconds == pytest.approx(1e-9 * timed.candidate.cost.macs)
        assert timed.original == pytest.approx(1e-9 * site.cost.macs)
        assert timed.gain == pytest.approx(1 - timed.candidate.cost.macs / site.cost.macs)


def test_a_slower_option_has_a_negative_gain(structures: dict[str, Structure]) -> None:
    timer = FalseTimer(seconds=lambda graph, _size: 1.0 if len(graph[0]) == 1 else 1.25)
    site, candidates = candidates_at(pair(), "1", structures, 2, "channel")
    [timed] = LatencyTable(structures, timer=timer).of(site, candidates)
    assert timed.gain == -0.25
    assert LatencyTable(structures, timer=timer).saving(site, candidates[0]) == -0.25


def test_every_call_of_a_site_counts(structures: dict[str, Structure]) -> None:
    model = settled(CalledTwice(16))
    sizes: list[Size] = []

    def seconds(graph: OptionGraph, size: Size) -> float:
        sizes.append(size)
        return by_macs(graph, size)

    timer = FalseTimer(seconds=seconds)
    site, candidates = candidates_at(model, "shared", structures, 4, "channel")
    [timed] = LatencyTable(structures, timer=timer).of(site, candidates)
    assert set(sizes) == {(16, 16), (8, 8)}
    assert (
        timed.original == LatencyTable(structures, timer=timer).original(site) == pytest.approx(1e-9 * site.cost.macs)
    )
    assert timed.seconds == pytest.approx(1e-9 * timed.candidate.cost.macs)


def test_calls_at_one_size_are_timed_once(structures: dict[str, Structure]) -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(self.conv(self.stem(x))))

    timer = FalseTimer()
    site, candidates = candidates_at(Thrice().eval(), "conv", structures, 4, "channel")
    [timed] = LatencyTable(structures, timer=timer).of(site, candidates)
    assert len(timer.asked) == 1
    assert timed.seconds == pytest.approx(3e-9 * macs_of(timer.asked[0], (16, 16)))


def test_the_saving_is_that_of_the_lowering_it_has(structures: dict[str, Structure]) -> None:
    timer = FalseTimer(seconds=lambda graph, _size: 1.0 if len(graph[0]) == 1 else 0.5 if len(graph) > 1 else 0.2)
    site, candidates = candidates_at(pair(), "1", structures, 2, "separable")
    assert {candidate.option.lowering for candidate in candidates} == {"branches"}
    assert [LatencyTable(structures, timer=timer).saving(site, candidate) for candidate in candidates] == [0.5] * len(
        candidates
    )


def test_threads_rounds_and_cache_reach_the_timer(
    monkeypatch: pytest.MonkeyPatch, structures: dict[str, Structure], tmp_path: Path
) -> None:
    asked: list[dict[str, object]] = []

    def timed(_original: object, options: list[OptionGraph], _size: Size, **named: object) -> tuple[float, list[float]]:
        asked.append(named)
        return 1.0, [1.0 for _ in options]

    monkeypatch.setattr(timing, "time_options", timed)
    cache = TimingCache(tmp_path)
    site, candidates = candidates_at(pair(), "1", structures, 2, "channel")
    LatencyTable(structures, threads=2, rounds=7, timer=RuntimeTimer(cache)).of(site, candidates)
    [named] = asked
    del named["unit"]
    assert named == {"threads": 2, "rounds": 7, "cache": cache, "target": ONNXRUNTIME}


def test_a_clock_that_runs_backwards_in_the_end_is_an_error_and_not_a_time(structures: dict[str, Structure]) -> None:
    readings = iter([0.0, 1.0] * 200 + [5.0, 1.0] * 100_000)
    site, _ = candidates_at(pair(), "1", structures, 2, "channel")
    graphs: list[OptionGraph] = [((site.folded_spec,),)] * 2

    class Backwards(OnnxRuntime):
        def clock(self, threads: int) -> Clock:
            return lambda: next(readings)

    with pytest.raises(latency.VerificationError, match="expected every sample to take time"):
        latency.time_graphs(graphs, site.input_sizes[0], rounds=200, target=Backwards())


def test_a_candidate_is_timed_once(
    structures: dict[str, Structure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, candidates = candidates_at(pair(), "1", structures, 2, "channel", "separable")
    latency_table = LatencyTable(structures, rounds=2, timer=RuntimeTimer(TimingCache(tmp_path)).steady())
    first = latency_table.of(site, candidates)
    assert all(timed.seconds > 0 and timed.original > 0 for timed in first)
    monkeypatch.setattr(latency, "time_graphs", lambda *_args, **_named: pytest.fail("timed again"))
    assert latency_table.of(site, candidates) == first
    assert latency_table.original(site) == first[0].original


# --- channel blocks


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ((Stage(16, 32, "hw"), Stage(32, 24)), True),
        ((Stage(16, 20, "hw"), Stage(20, 24)), False),  # what lies between is no multiple
        ((Stage(10, 16, "hw"), Stage(16, 7)), True),  # the ends are the original's
        ((Stage(16, 48, "hw", 16), Stage(48, 24)), True),  # depthwise
        ((Stage(16, 48), Stage(48, 24, "hw", 24)), True),  # the other way round
        ((Stage(64, 64, "hw", 4), Stage(64, 24)), True),
        ((Stage(64, 64, "hw", 8), Stage(64, 24)), False),  # groups of eight
        ((Stage(64, 32, "hw", 4), Stage(32, 24)), False),  # groups of sixteen in, of eight out
        ((Stage(32, 64, "hw", 4), Stage(64, 24)), False),  # groups of eight in, of sixteen out
        ((Stage(16, 16), Stage(16, 16, "hw"), Stage(16, 24)), True),
        ((Stage(16, 16), Stage(16, 8, "hw"), Stage(8, 24)), False),
        ((Stage(16, 24, "hw"),), True),
    ],
)
def test_chains_that_fill_blocks_of_sixteen_channels(stages: tuple[Stage, ...], expected: bool) -> None:
    assert aligned(stages, 16) is expected


def test_a_chain_may_fill_smaller_blocks_alone() -> None:
    stages = (Stage(16, 8, "hw"), Stage(8, 24))
    assert aligned(stages, 8) and not aligned(stages, 16)
