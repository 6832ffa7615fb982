"""A latency budget is corrected by what whole plans measure; here by clocks that lie."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clocks import FalseTimer
from networks import Residual, macs_by_hooks, settled
from torch import nn

from convrewrite.errors import PlanError
from convrewrite.pipeline.prepare import prepare
from convrewrite.planning import latency_budget
from convrewrite.planning.allocation import Allocation
from convrewrite.planning.costs import Timed
from convrewrite.planning.curves import Scored, Surveyed
from convrewrite.planning.latency_budget import MEASUREMENTS, _next_aim, allocate_measured, measured_part
from convrewrite.rewriting.work import Prepared
from convrewrite.rules.options import Shortlist
from convrewrite.rules.schema import Protect, Rule
from convrewrite.runtime import exporting
from convrewrite.runtime.onnx_export import Exported
from convrewrite.runtime.timing import Baseline, Unmeasured

NANOSECOND = 1e-9


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    rule = Rule(name="r", structures=("channel", "separable"), protect=Protect(min_channels=0, min_mac_share=0))
    return prepare(settled(Residual(16)), (torch.zeros(1, 3, 16, 16),), [rule])


@pytest.fixture(scope="module")
def surveyed(prepared: Prepared) -> tuple[Surveyed, ...]:
    """Every option takes a nanosecond for each of its MACs; effects are invented."""
    found = []
    for index, space in enumerate(prepared.search_spaces):
        options = []
        for candidate in (rank_range.at(rank) for rank_range in space.rank_ranges for rank in rank_range.ranks):
            part = candidate.cost.macs / space.site.cost.macs
            if part < 1:
                effect = (1 + index) * (1.1 - part) ** 3
                options.append(Scored(candidate, effect, effect, False).timed(NANOSECOND * candidate.cost.macs))
        found.append(Surveyed(space.site, tuple(options), (), NANOSECOND * space.site.cost.macs, space.reason))
    return tuple(found)


Search = Callable[..., tuple[Allocation, list[float]]]


@pytest.fixture
def search(
    prepared: Prepared, surveyed: tuple[Surveyed, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Search:
    """Allocate where a plan that is predicted to leave a part of the time measures what ``truth`` says of it."""

    def run(asked: float, truth: Callable[[float], float]) -> tuple[Allocation, list[float]]:
        seen: list[float] = []
        totals = Timed(prepared.totals, NANOSECOND * prepared.totals.macs)

        def measure(_prepared: Prepared, shortlists: tuple[Shortlist, ...], *_args: object) -> float:
            saved = sum(o.site.cost.macs - o.candidates[0].cost.macs for o in shortlists if o.candidates)
            seen.append(1 - saved / prepared.totals.macs)
            return truth(seen[-1])

        monkeypatch.setattr(latency_budget, "measured_part", measure)
        found = allocate_measured(prepared, surveyed, {"latency": asked}, totals, Unmeasured())
        return found, seen

    return run


def test_a_plan_that_measures_as_predicted_is_taken_at_once(search: Search) -> None:
    found, seen = search(0.6, lambda part: part)
    assert len(seen) == 1
    assert 0.97 * 0.6 <= found.part("latency") <= 0.6


@pytest.mark.parametrize("factor", [1.15, 0.85])
def test_the_budget_is_corrected_by_what_was_measured(search: Search, factor: float) -> None:
    found, seen = search(0.6, lambda part: factor * part)
    assert 1 < len(seen) <= MEASUREMENTS
    assert 0.95 * 0.6 <= factor * found.part("latency") <= 0.6


@pytest.mark.parametrize("seed", range(5))
def test_it_comes_near_though_times_do_not_add_up(search: Search, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    told: list[float] = []

    def truth(part: float) -> float:
        told.append(part**0.8 * (0.97 + 0.02 * float(torch.rand((), generator=noise))))
        return told[-1]

    found, seen = search(0.5, truth)
    [measured] = [t for part, t in zip(seen, told, strict=True) if part == pytest.approx(found.part("latency"))]
    assert 0.95 * 0.5 <= measured <= 0.5
    assert len(seen) <= MEASUREMENTS


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ([(0.8, 0.7)], 0.7 * 0.591 / 0.8),  # in proportion
        ([(0.4, 0.5)], 0.5 * 0.591 / 0.4),
        ([(0.8, -0.1)], -0.1 - (0.8 - 0.591)),  # options save more than the whole time
        ([(0.7, 0.65), (0.5, 0.45)], 0.45 + 0.2 * (0.591 - 0.5) / 0.2),  # between the two
        ([(0.9, 0.9), (0.3, 0.2), (0.7, 0.65), (0.5, 0.45)], 0.45 + 0.2 * (0.591 - 0.5) / 0.2),  # the nearest ones
        ([(0.6, 0.5), (0.65, 0.55)], 0.5 + 0.05 * (0.591 - 0.6) / 0.05),  # the limit itself is within
        (
            [(0.7, 0.45), (0.5, 0.5)],
            0.5 * 0.591 / 0.5,
        ),  # what measures less was predicted to take longer: the last counts
        ([(0.7, 0.5), (0.5, 0.5)], 0.5 * 0.591 / 0.5),
        ([(0.8, 0.7), (0.7, 0.65)], 0.65 * 0.591 / 0.7),
    ],
)
def test_the_next_aim_by_hand(tried: list[tuple[float, float]], expected: float) -> None:
    """Of a limit of 0.6: half way between it and 0.97 of it lies 0.591."""
    assert _next_aim(tried, 0.6) == pytest.approx(expected)


def test_a_plan_that_was_measured_is_not_measured_again(search: Search) -> None:
    _, seen = search(0.6, lambda part: 0.5 if part < 0.61 else 0.7)
    assert len(seen) == len(set(seen))


def test_of_those_within_the_budget_the_least_harmful_is_taken(search: Search) -> None:
    answers = iter([0.5, 0.45, 0.55, 0.57])
    found, seen = search(0.6, lambda _part: next(answers))
    assert len(seen) == 4
    assert found.part("latency") == pytest.approx(max(seen)), "the more is left, the less harm is done"


def test_where_none_is_within_the_nearest_is_taken(search: Search) -> None:
    answers = iter([0.8, 0.65, 0.7, 0.66])
    found, seen = search(0.6, lambda _part: next(answers))
    assert found.part("latency") == pytest.approx(seen[1])


def test_where_no_smaller_plan_is_left_the_last_one_stands(search: Search) -> None:
    found, seen = search(0.3, lambda part: 0.33)
    assert len(seen) >= 1
    assert found.part("latency") == pytest.approx(seen[0])


def test_a_budget_that_no_whole_plan_comes_near_is_refused_with_what_was_measured(search: Search) -> None:
    with pytest.raises(PlanError, match=r"latency=0\.3 cannot be met .* they reach latency=1\.\d+ at the least"):
        search(0.3, lambda part: 4 * part)


def test_a_budget_that_the_options_own_times_deny_is_refused(search: Search) -> None:
    with pytest.raises(PlanError, match=r"latency=0\.02 cannot be met .* they reach latency=0\.\d+ at the least"):
        search(0.02, lambda part: part)


def test_the_unfitted_plan_is_what_is_exported(
    prepared: Prepared, surveyed: tuple[Surveyed, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exported: list[nn.Module] = []

    def export(model: nn.Module, _inputs: object, path: Path, **_named: object) -> Exported:
        exported.append(model)
        return Exported(path, True)

    monkeypatch.setattr(exporting, "export", export)
    shortlists = [
        Shortlist(entry.site, (entry.options[3].candidate,) if entry.options else (), entry.reason)
        for entry in surveyed
    ]
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    original = Exported(tmp_path / "original.onnx", True)
    baseline = Baseline(original, prepared.inputs, tmp_path, FalseTimer(0.7), 1, exporting.TorchExporter())
    assert measured_part(prepared, shortlists, baseline) == 0.7
    x = torch.zeros(1, 3, 16, 16)
    saved = sum(o.site.cost.macs - o.candidates[0].cost.macs for o in shortlists if o.candidates)
    assert macs_by_hooks(prepared.model, x) - macs_by_hooks(exported[0], x) == saved > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.model.state_dict().items())
