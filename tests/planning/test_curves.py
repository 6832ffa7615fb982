"""What is read off a few measured errors and effects."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convrewrite.fitting.found import Fit
from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.planning.costs import Counted, seconds_of
from convrewrite.planning.curves import (
    FAR_BEHIND,
    LEAST_EFFECT,
    MOST_EFFECT,
    Curve,
    FittedCandidate,
    between,
    competitive,
    faithful_enough,
    interpolated,
    spread,
)
from convrewrite.planning.knapsack import Item, choose
from convrewrite.rules.options import RankRange, search_spaces
from convrewrite.rules.schema import Protect, Require, Rule
from convrewrite.structures.discovery import discover

RANKS = range(2, 13)


def rank_ranges(limit: float | None = None) -> list[RankRange]:
    """Those of ``asymmetric`` and ``channel`` at a convolution from 16 to 16 channels."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    rule = Rule(
        name="r", structures=("asymmetric", "channel"), protect=Protect(stem=False),
        require=Require(max_output_error=limit),
    )  # fmt: skip
    [space] = search_spaces(find_sites(model, (torch.zeros(1, 16, 8, 8),), trace(model)), [rule], discover())
    return list(space.rank_ranges)


def curve(
    shares: dict[int, float], rank_range: RankRange | None = None, remaining: float = 1.0, timed: bool = False
) -> Curve:
    """The ranks 2 to 12 of a rank range, fitted at these; these shares are left unexplained; in nanoseconds of their MACs."""
    rank_range = rank_range or rank_ranges()[0]
    candidates = tuple(rank_range.at(rank) for rank in RANKS)
    samples = tuple(FittedCandidate(rank_range.at(r), Fit((), torch.zeros(0), e), remaining) for r, e in shares.items())
    return Curve(rank_range, candidates, tuple(1e-9 * p.cost.macs for p in candidates) if timed else (), samples)


def ranks(candidates: Sequence[object]) -> list[int]:
    return [candidate.option.parameters["rank"] for candidate in candidates]  # type: ignore[attr-defined]


# --- numbers


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=5), st.floats(-12, 12))
def test_interpolation_goes_through_its_points_and_stays_between_them(
    points: list[tuple[float, float]], x: float
) -> None:
    points = sorted({round(x, 3): round(y, 3) for x, y in points}.items())
    for at, value in points:
        assert interpolated(points, at, 1.0) == pytest.approx(value)
    found = interpolated(points, x, 2.0)
    if x < points[0][0]:
        assert found == pytest.approx(points[0][1] + 2 * (x - points[0][0]))
    elif x > points[-1][0]:
        assert found == pytest.approx(points[-1][1] + 2 * (x - points[-1][0]))
    else:
        left, right = max(p for p in points if p[0] <= x), min(p for p in points if p[0] >= x)
        assert min(left[1], right[1]) - 1e-9 <= found <= max(left[1], right[1]) + 1e-9


@given(st.sets(st.integers(1, 500), min_size=1), st.integers(1, 9))
def test_spread_and_between_pick_from_what_there_is(values: set[int], count: int) -> None:
    ascending = sorted(values)
    for pick in (spread, between):
        found = pick(ascending, count)
        assert 1 <= len(found) <= max(count, 1)
        assert found == sorted(set(found))
        assert set(found) <= values
    if count > 1:
        assert {ascending[0], ascending[-1]} <= set(spread(ascending, count))


def test_spread_is_even_in_the_logarithm() -> None:
    assert spread(range(1, 1001), 4) == [1, 10, 100, 1000]
    assert between(range(1, 10_001), 2) == [10, 1000]
    assert spread([3, 4, 5], 1) == [4]


# --- curves


def test_errors_are_interpolated_log_log_in_the_cost() -> None:
    found = curve({2: 0.4, 8: 0.1})  # asymmetric: the cost is proportional to the rank, so 0.8 / rank is unexplained
    for rank in RANKS:
        assert found.error_of(found.rank_range.at(rank)) == pytest.approx((0.8 / rank) ** 0.5)


def test_effects_are_interpolated_log_log_in_the_error() -> None:
    found = curve({2: 0.4, 8: 0.1})
    scored = found.scored([(found.samples[0], 3 * 0.4**2), (found.samples[1], 3 * 0.1**2)])
    assert ranks([s.candidate for s in scored]) == list(RANKS)
    for entry in scored:
        rank = entry.candidate.option.parameters["rank"]
        assert isinstance(rank, int)
        share = 0.8 / rank
        # Between the measured ones with the power that they show, beyond them with the share itself.
        expected = 3 * share**2 if 2 <= rank <= 8 else 3 * 0.1**2 * share / 0.1
        assert entry.effect == pytest.approx(expected)
        assert entry.error == pytest.approx(share**0.5)
        assert entry.measured == (rank in (2, 8))


def test_one_measured_effect_goes_with_the_error() -> None:
    found = curve({4: 0.2})
    for entry in found.scored([(found.samples[0], 0.05)]):
        assert entry.effect == pytest.approx(0.05 * entry.error**2 / 0.2)


def test_an_exact_option_has_a_tiny_effect_and_no_logarithm_of_zero() -> None:
    found = curve({2: 0.4, 8: 0.0})
    scored = found.scored([(found.samples[0], 1.0), (found.samples[1], 0.0)])
    effects = {entry.candidate.option.parameters["rank"]: entry.effect for entry in scored}
    assert effects[8] == pytest.approx(LEAST_EFFECT)
    assert all(math.isfinite(effect) for effect in effects.values())


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)])
def test_outputs_that_are_no_numbers_are_as_harmful_as_any_can_be(broken: tuple[int, ...]) -> None:
    found = curve({2: 0.4, 11: 0.1})
    measured = [(sample, math.inf if i in broken else 0.02) for i, sample in enumerate(found.samples)]
    scored = found.scored(measured)
    assert all(LEAST_EFFECT <= entry.effect <= MOST_EFFECT for entry in scored)
    assert max(entry.effect for entry in scored) == pytest.approx(MOST_EFFECT)
    chosen = choose([[Item(0.0, (10.0,)), *(Item(entry.effect, (1.0,)) for entry in scored)]], [5.0])
    assert chosen is not None


def test_what_refinement_is_expected_to_gain_lowers_error_and_effect() -> None:
    rough, fine = curve({2: 0.4, 8: 0.1}, remaining=0.5), curve({2: 0.4, 8: 0.1})
    measured = [(0, 0.4), (1, 0.1)]
    pairs = zip(
        rough.scored([(rough.samples[i], e) for i, e in measured]),
        fine.scored([(fine.samples[i], e) for i, e in measured]),
        strict=True,
    )
    for expected, plain in pairs:
        assert expected.error == pytest.approx(0.5**0.5 * plain.error)
        assert expected.effect == pytest.approx(0.5 * plain.effect)
        assert not expected.measured, "no finished fit was measured"


def test_seconds_stay_with_their_ranks() -> None:
    found = curve({2: 0.4, 8: 0.1}, timed=True)
    few = found.only([found.rank_range.at(rank) for rank in (3, 8)])
    assert ranks(few.candidates) == [3, 8]
    assert few.seconds == tuple(1e-9 * p.cost.macs for p in few.candidates)
    assert ranks([sample.candidate for sample in few.samples]) == [8]
    assert [seconds_of(entry.costs) for entry in few.scored([(few.samples[0], 1.0)])] == list(few.seconds)
    assert few.points == [(pytest.approx(math.log(few.seconds[1])), pytest.approx(math.log(0.1)))]
    untimed = curve({2: 0.4}).scored([(found.samples[0], 1.0)])[0]
    assert untimed.costs == Counted(untimed.candidate.cost)


# --- which are left out


def test_a_rank_range_that_is_far_behind_everywhere_is_left_out() -> None:
    first, second = rank_ranges()[:2]
    good = curve({2: 0.4, 8: 0.1}, first)
    near = curve({rank: FAR_BEHIND * 0.99 * share for rank, share in ((2, 0.4), (8, 0.1))}, second)
    far = curve({rank: FAR_BEHIND * 1.01 * share for rank, share in ((2, 0.4), (8, 0.1))}, second)
    assert competitive([good, near]) == ([good, near], [])
    assert competitive([far, good]) == ([good], [far])
    assert competitive([far]) == ([far], []), "there is nothing better"


def test_a_rank_range_that_is_good_at_one_cost_stays() -> None:
    first, second = rank_ranges()[:2]
    flat, steep = curve({2: 0.3, 8: 0.2}, first), curve({2: 0.9, 8: 0.05}, second)
    assert competitive([flat, steep]) == ([flat, steep], [])


def test_where_time_counts_rank_ranges_are_compared_at_equal_time() -> None:
    first, second = rank_ranges()[:2]
    fast, slow = curve({2: 0.4, 8: 0.1}, first, timed=True), curve({2: 0.4, 8: 0.1}, second, timed=True)
    slow = Curve(slow.rank_range, slow.candidates, tuple(2 * s for s in slow.seconds), slow.samples)
    assert competitive([fast, slow]) == ([fast], [slow])


def test_a_rules_error_limit_drops_what_exceeds_it_with_the_reason() -> None:
    rank_range = rank_ranges(0.5)[0]  # a relative error of 0.5 leaves a quarter unexplained
    kept, dropped = faithful_enough([curve({2: 0.4, 8: 0.1}, rank_range)])
    assert ranks(kept[0].candidates) == list(range(4, 13)), "0.8 / rank <= 0.25, 3 is beyond"
    assert [kept[0].error_of(p) for p in kept[0].candidates] == pytest.approx(
        [(0.8 / rank) ** 0.5 for rank in range(4, 13)]
    )
    assert ranks([entry.candidate for entry in dropped]) == [2]
    assert dropped[0].reason == "its output error exceeds 0.5, the rule's limit"
    assert dropped[0].error == 0.4**0.5
    nothing, all_of_it = faithful_enough([curve({2: 0.9, 8: 0.6}, rank_range)])
    assert nothing == []
    assert ranks([entry.candidate for entry in all_of_it]) == [2, 8]
    unlimited = curve({2: 0.9})
    assert faithful_enough([unlimited]) == ([unlimited], [])
