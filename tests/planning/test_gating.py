"""The latency gate, with a timer that is made to lie."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from clocks import FalseTimer, by_macs
from torch import nn

import convrewrite
from convrewrite.conv import Size
from convrewrite.errors import PlanError
from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.planning.latency_table import (
    LatencyTable,
    change_told,
    fast_enough,
    gains,
    in_fastest_lowering,
    least_of,
)
from convrewrite.rules.options import Shortlist, search_spaces, shortlist_of
from convrewrite.rules.schema import Protect, Require, Rule
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.timing import RuntimeTimer
from convrewrite.runtime.timing_cache import TimingCache
from convrewrite.structures.structure import Structure

MODEL = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval()
X = torch.zeros(1, 16, 8, 8)


def rule(gain: float | None, *names: str) -> Rule:
    require = Require(min_latency_gain=gain)
    return Rule(name="r", structures=names or ("channel", "asymmetric"), protect=Protect(stem=False), require=require)


def shortlist(structures: dict[str, Structure], gain: float | None, *names: str) -> Shortlist:
    sites = find_sites(MODEL, (X,), trace(MODEL))
    return shortlist_of(search_spaces(sites, [rule(gain, *names)], structures)[0])


def in_order(seconds: Sequence[float], ratio: float = 0.9) -> FalseTimer:
    """Every option takes the given times, in the order channel, vertical-first, horizontal-first; the original one."""
    options: dict[OptionGraph, float] = {}

    def of(graph: OptionGraph, _size: object) -> float:
        if len(graph) == 1 and len(graph[0]) == 1:
            return 1.0
        return options.setdefault(graph, seconds[len(options)])

    return FalseTimer(ratio, of)


def describe(found: Shortlist) -> list[str]:
    return [candidate.option.describe() for candidate in found.candidates]


def test_slow_options_are_refused_with_the_measured_change(structures: dict[str, Structure]) -> None:
    timer = in_order([1.2, 1.1, 1.3])
    [found] = fast_enough([shortlist(structures, 0.05)], LatencyTable(structures, timer=timer))
    assert found.candidates == ()
    assert found.reason == "no option is fast enough: the best changes the measured time by +10%"


def test_the_fast_option_stays(structures: dict[str, Structure]) -> None:
    timer = in_order([0.5, 1.1, 1.3])
    [found] = fast_enough([shortlist(structures, 0.05)], LatencyTable(structures, timer=timer))
    assert found.reason is None
    assert [name.partition(",")[0] for name in describe(found)] == ["channel"]


def test_the_limit_is_the_rules_own(structures: dict[str, Structure]) -> None:
    timer = in_order([0.5, 0.79, 0.81])
    [found] = fast_enough([shortlist(structures, 0.2)], LatencyTable(structures, timer=timer))
    assert [name.split(", ")[-1] for name in describe(found)] == ["rank 7", "vertical-first"]


def test_without_the_limit_slow_options_stay(structures: dict[str, Structure]) -> None:
    timer = in_order([1.2, 1.1, 1.3])
    before = shortlist(structures, None)
    assert fast_enough([before], LatencyTable(structures, timer=timer, least_gain=None)) == (before,)


def test_by_default_none_is_slower_than_what_it_replaces(structures: dict[str, Structure]) -> None:
    before = shortlist(structures, None)
    [found] = fast_enough([before], LatencyTable(structures, timer=in_order([1.2, 0.99, 1.3])))
    assert len(found.candidates) == 1
    [nothing] = fast_enough([before], LatencyTable(structures, timer=in_order([1.2, 1.01, 1.3])))
    assert nothing.reason == "no option is fast enough: the best changes the measured time by +1%"


@pytest.mark.parametrize(
    ("change", "least_gain", "told"),
    [(-0.001, 0.05, "+0%"), (-0.047, 0.05, "-4.7%"), (0.003, 0.0, "+0.3%"), (-0.03, 0.05, "-3%"), (0.2, 0.05, "+20%")],
)
def test_a_change_of_time_is_told_on_its_own_side_of_what_must_be_gained(
    change: float, least_gain: float, told: str
) -> None:
    assert change_told(change, least_gain) == f"changes the measured time by {told}"


def test_what_cannot_run_there_is_never_taken(structures: dict[str, Structure]) -> None:
    before = shortlist(structures, None)
    [found] = fast_enough([before], LatencyTable(structures, timer=in_order([1.2, math.inf, 1.3]), least_gain=None))
    assert found.candidates == (before.candidates[0], before.candidates[2])
    [nothing] = fast_enough([before], LatencyTable(structures, timer=in_order([math.inf] * 3), least_gain=None))
    assert (nothing.candidates, nothing.reason) == ((), "no option can run there")
    assert not gains(math.inf, 1.0, least_of(rule(None), None)) and gains(9.0, 1.0, least_of(rule(None), None))


@pytest.mark.parametrize("fastest", ["branches", "chain"])
def test_options_are_lowered_as_they_run_fastest(structures: dict[str, Structure], fastest: str) -> None:
    timer = FalseTimer(seconds=lambda graph, _size: 1.0 + (len(graph) == 1) * (0.5 if fastest == "branches" else -0.5))
    before = shortlist(structures, None, "separable")
    for found in (
        in_fastest_lowering([before], LatencyTable(structures, timer=timer)),
        fast_enough([before], LatencyTable(structures, timer=timer)),
    ):
        assert [p.option.setting for p in found[0].candidates] == [p.option.setting for p in before.candidates]
        assert {p.option.lowering for p in found[0].candidates} == {fastest}


def test_a_site_without_options_keeps_its_reason(structures: dict[str, Structure]) -> None:
    timer = FalseTimer()
    nothing = Shortlist(shortlist(structures, None).site, (), "it is the stem")
    assert (
        fast_enough([nothing], LatencyTable(structures, timer=timer))
        == in_fastest_lowering([nothing], LatencyTable(structures, timer=timer))
        == (nothing,)
    )
    assert timer.asked == []


def test_a_refused_site_is_told_in_the_report() -> None:
    result = convrewrite.optimize(MODEL, X, [rule(0.05)], "weights", timer=in_order([1.2, 1.1, 1.3], ratio=1.0))
    [site] = result.report.sites
    assert site.option is None
    assert site.reason == "no option is fast enough: the best changes the measured time by +10%"


def slow_channels(graph: OptionGraph, size: Size) -> float:
    """Seconds by which two stages take longer than the one that they replace."""
    return by_macs(graph, size) if len(graph[0]) == 1 else 1.0


def test_a_budget_of_macs_takes_nothing_slower_and_names_no_latency_where_nothing_gains_time() -> None:
    asked = {"calibration": "weights", "budget": {"macs": 0.7}, "fast": True}
    timer = FalseTimer(seconds=slow_channels)
    with pytest.raises(
        PlanError, match=r"cannot be met .* measure slower than what they replace; --any-speed takes them too\n"
    ):
        convrewrite.optimize(MODEL, X, [rule(None)], timer=timer, **asked)
    result = convrewrite.optimize(MODEL, X, [rule(None)], timer=FalseTimer(1.5, slow_channels), any_speed=True, **asked)
    assert result.report.totals.macs.ratio <= 0.7
    assert result.report.totals.onnx_latency_seconds is not None
    assert result.refused is None or "slower" not in result.refused
    assert result.plan.any_speed


def test_nothing_is_timed_where_nothing_is_measured() -> None:
    timer = in_order([])
    result = convrewrite.optimize(MODEL, X, [rule(None)], "weights", measure=False, timer=timer)
    assert result.report.sites[0].option is not None
    assert timer.asked == []


def test_a_real_timer_is_asked_and_its_answers_are_kept(tmp_path: Path, structures: dict[str, Structure]) -> None:
    latency_table = LatencyTable(structures, rounds=3, timer=RuntimeTimer(TimingCache(tmp_path)))
    fast_enough([shortlist(structures, 0.001)], latency_table)
    assert len(list(tmp_path.rglob("*.json"))) == 4  # the original and three options
