"""The knapsack against trying every combination."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convrewrite.planning import knapsack
from convrewrite.planning.knapsack import Item, choose, least, undominated

numbers = st.integers(0, 30).map(float)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Item]], list[float]]:
    resources = draw(st.integers(0, 3))
    items = st.builds(Item, numbers, st.tuples(*[numbers] * resources))
    groups = draw(st.lists(st.lists(items, min_size=1, max_size=4), min_size=1, max_size=5))
    limits = draw(st.lists(st.integers(0, 90).map(float), min_size=resources, max_size=resources))
    return groups, limits


def spent(groups: list[list[Item]], chosen: tuple[int, ...], resource: int) -> float:
    return sum(group[i].costs[resource] for group, i in zip(groups, chosen, strict=True))


def effect(groups: list[list[Item]], chosen: tuple[int, ...]) -> float:
    return sum(group[i].effect for group, i in zip(groups, chosen, strict=True))


@settings(max_examples=300)
@given(problems())
def test_it_equals_brute_force(problem: tuple[list[list[Item]], list[float]]) -> None:
    groups, limits = problem
    everything = itertools.product(*(range(len(group)) for group in groups))
    allowed = [c for c in everything if all(spent(groups, c, r) <= limit for r, limit in enumerate(limits))]
    chosen = choose(groups, limits)
    if not allowed:
        assert chosen is None
        return
    assert chosen in allowed
    assert effect(groups, chosen) == pytest.approx(min(effect(groups, c) for c in allowed))


@given(problems())
def test_what_is_left_out_is_beaten(problem: tuple[list[list[Item]], list[float]]) -> None:
    group = problem[0][0]
    kept = undominated(group)
    assert kept
    for i, item in enumerate(group):
        beaten = [
            k for k in kept
            if group[k].effect <= item.effect and all(a <= b for a, b in zip(group[k].costs, item.costs, strict=True))
        ]  # fmt: skip
        assert beaten == [i] if i in kept else beaten


def test_large_numbers_keep_their_limit_exactly() -> None:
    groups = [[Item(0.0, (1e9 + i,)), Item(1.0, (5e8 + i,)), Item(5.0, (1e8,))] for i in range(20)]
    chosen = choose(groups, [1e10])
    assert chosen is not None
    assert spent(groups, chosen, 0) <= 1e10
    assert spent(groups, chosen, 0) > 0.94e10


def test_small_effects_are_told_apart_beside_a_large_one() -> None:
    random = np.random.default_rng(0)
    for _ in range(6):
        costs, effects = random.integers(10, 90, (5, 6)), 1e-5 * random.random((5, 6))
        groups = [
            [Item(0.0, (100.0,)), *(Item(e, (float(c),)) for e, c in zip(*pair, strict=True)), Item(1e6, (5.0,))]
            for pair in zip(effects.tolist(), costs.tolist(), strict=True)
        ]
        everything = itertools.product(range(8), repeat=5)
        least_harm = min(effect(groups, chosen) for chosen in everything if spent(groups, chosen, 0) <= 250)
        chosen = choose(groups, [250.0])
        assert chosen is not None
        assert effect(groups, chosen) == pytest.approx(least_harm, rel=1e-5)


def test_tiny_effects_count() -> None:
    groups = [[Item(0.0, (2.0,)), Item(1e-9 * (i + 1), (1.0,))] for i in range(4)]
    assert choose(groups, [7.0]) == (1, 0, 0, 0)


def test_nothing_to_choose_from() -> None:
    assert choose([], [1.0]) == ()
    assert least([]) == ()
    assert least([[Item(0, (3.0, 1.0)), Item(0, (2.0, 4.0))]]) == (2.0, 1.0)


def test_the_solver_writes_nothing_to_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    solve = knapsack.milp

    def loud(*args: object, **kwargs: object) -> object:
        os.write(1, b"noise of a library in C")
        return solve(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(knapsack, "milp", loud)
    print("before")
    assert choose([[Item(0.0, (2.0,)), Item(1.0, (1.0,))]], [1.0]) == (1,)
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_a_tiny_limit_beside_large_costs_is_kept() -> None:
    group = [Item(2.0, (1e-12,)), Item(1.0, (1e5,)), Item(3.0, (0.0,))]
    assert sorted(choose([group, group], [1e-12]) or ()) == [0, 2]


def alike(count: int) -> list[list[Item]]:
    """Sites with almost the same curves, which a proof takes long to tell apart."""
    costs = [1.0, 0.8, 0.55, 0.4, 0.3, 0.2]
    return [[Item((1 + i / 997) * (1 / c - 1) ** 0.5, (c * (1 + i / 499),)) for c in costs] for i in range(count)]


def test_an_unfinished_search_gives_the_best_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = alike(14)
    exact = choose(groups, [8.0])
    monkeypatch.setattr(knapsack, "NODES", 1)
    hasty = choose(groups, [8.0])
    assert exact is not None and hasty is not None
    assert hasty == choose(groups, [8.0])
    assert spent(groups, hasty, 0) <= 8
    assert effect(groups, exact) <= effect(groups, hasty) + 1e-9 <= 1.1 * effect(groups, exact)


def test_a_search_that_found_nothing_yet_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = knapsack.milp

    def nothing_yet(*args: object, options: dict[str, float], **kwargs: object) -> object:
        limited = options["node_limit"] == knapsack.NODES  # scipy renames the key in this very dictionary
        found = solve(*args, options=options, **kwargs)  # type: ignore[call-overload]
        if limited:
            found.x, found.status = None, knapsack.LIMIT_REACHED
        return found

    monkeypatch.setattr(knapsack, "milp", nothing_yet)
    assert choose([[Item(0.0, (2.0,)), Item(1.0, (1.0,))]], [1.0]) == (1,)
