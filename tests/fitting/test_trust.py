"""How far few inputs are believed: the shrinkage against its closed form, and what a target makes of a trust."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from convrewrite.fitting import targets
from convrewrite.fitting.moments import Moments
from convrewrite.fitting.targets import RIDGE, Ground
from convrewrite.fitting.trust import FULL, MANY_POSITIONS, RIDGES, Trust, doubtful, lesser_trusts, shrinkage_of


def moments_of(cov_p: Tensor, count: int = 50, outputs: int = 3) -> Moments:
    d = len(cov_p)
    cov_yp = torch.randn(outputs, d, dtype=torch.float64)
    zeros = torch.zeros(d, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
    return Moments(count, *zeros, cov_p.double(), cov_yp, torch.ones(outputs, dtype=torch.float64))


def correlated(d: int, strength: float) -> Tensor:
    """Unit variances, every pair correlated by ``strength``."""
    return torch.full((d, d), strength, dtype=torch.float64).fill_diagonal_(1.0)


@pytest.mark.parametrize(("d", "strength", "count"), [(2, 0.5, 10), (6, 0.9, 20), (6, 0.3, 200)])
def test_the_shrinkage_is_the_closed_form(d: int, strength: float, count: int) -> None:
    square = d + d * (d - 1) * strength**2  # the trace of the square of such a matrix, by hand
    expected = ((1 - 2 / d) * square + d**2) / ((count + 1 - 2 / d) * (square - d))
    found = shrinkage_of(moments_of(correlated(d, strength)), count)
    assert found == pytest.approx(min(1.0, expected))


def test_the_shrinkage_does_not_depend_on_the_scales_of_the_inputs() -> None:
    scales = torch.tensor([1e-3, 1.0, 50.0, 7.0], dtype=torch.float64)
    plain = correlated(4, 0.7)
    scaled = plain * scales[:, None] * scales
    assert shrinkage_of(moments_of(scaled), 30) == pytest.approx(shrinkage_of(moments_of(plain), 30))


def test_elements_that_never_vary_do_not_count() -> None:
    padded = torch.zeros(6, 6, dtype=torch.float64)
    padded[:4, :4] = correlated(4, 0.6)
    assert shrinkage_of(moments_of(padded), 30) == pytest.approx(shrinkage_of(moments_of(correlated(4, 0.6)), 30))
    assert shrinkage_of(moments_of(torch.zeros(4, 4)), 30) == 0


@pytest.mark.parametrize("count", [1, 3, 10, 100, 10_000])
def test_the_shrinkage_lies_between_none_and_all_and_falls_with_the_samples(count: int) -> None:
    factors = torch.randn(5, 12, dtype=torch.float64)
    singular = moments_of(factors.T @ factors)
    assert 0 <= shrinkage_of(singular, 10 * count) <= shrinkage_of(singular, count) <= 1
    assert shrinkage_of(moments_of(torch.eye(4)), count) == 1, "what is diagonal may be taken for that"


def test_all_shrinkage_leaves_the_variances_and_a_target_that_solves_its_problem() -> None:
    given, kernel = moments_of(correlated(9, 0.8)), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    target = Ground.of(kernel, given).target(shrinkage=1.0)
    torch.testing.assert_close(target.covariance, (1 + RIDGE) * torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(target.response, target.kernel @ target.covariance)
    # What the kernel itself explains stays with it; only what it misses is told by the inputs, one by one.
    missed = given.cov_yp - kernel.flatten(1) @ given.cov_p
    torch.testing.assert_close(target.kernel, kernel.flatten(1) + missed / (1 + RIDGE))


def test_less_trust_comes_nearer_to_the_weights() -> None:
    given, kernel = moments_of(correlated(9, 0.5)), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    far = [float((Ground.of(kernel, given).target(t.ridge).kernel - kernel.flatten(1)).norm()) for t in ladder()]
    assert far == sorted(far, reverse=True)
    assert far[-1] < far[0]


def ladder() -> tuple[Trust, ...]:
    return (FULL, *(Trust(ridge) for ridge in RIDGES))


def test_what_is_tried_are_the_ridges_and_a_shrinkage_by_the_examples() -> None:
    given = moments_of(correlated(9, 0.5))
    found = lesser_trusts(given, 20)
    assert found[:-1] == ladder()[1:]
    assert found[-1] == Trust(shrinkage=shrinkage_of(given, 20))
    assert all(trust.ridge >= FULL.ridge for trust in found)


@pytest.mark.parametrize(
    ("count", "seen", "unseen", "expected"),
    [
        (100, 0.10, 0.20, True),
        (100, 0.10, 0.105, False),  # two halves of the same inputs
        (100, 0.10, 0.05, False),
        (MANY_POSITIONS * 100, 0.10, 0.20, False),  # many positions: other inputs differ, and no ridge helps that
        (100, 0.0, 1e-9, False),  # nothing is wrong with it
        (100, 0.0, 0.1, True),
    ],
)
def test_a_fit_is_doubtful_where_positions_are_few_and_others_fare_worse(
    count: int, seen: float, unseen: float, expected: bool
) -> None:
    assert doubtful(count, 100, seen, unseen) is expected


def test_where_the_inputs_are_the_originals_nothing_is_solved_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch.randn(3, 1, 3, 3, dtype=torch.float64)
    given = moments_of(correlated(9, 0.8))
    exact = replace(given, cov_yp=kernel.flatten(1) @ given.cov_p)
    rounded = replace(given, cov_yp=exact.cov_yp * (1 + 1e-6 * torch.randn(3, 9, dtype=torch.float64)))
    by_solving = kernel.flatten(1) + targets._solution(
        Ground.of(kernel, rounded).target().covariance, rounded.cov_yp - exact.cov_yp, torch.float64
    )
    torch.testing.assert_close(by_solving, kernel.flatten(1), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(targets, "_solution", lambda *_: pytest.fail("solved for"))
    for moments in (exact, rounded):
        assert torch.equal(Ground.of(kernel, moments).target().kernel, kernel.flatten(1))
