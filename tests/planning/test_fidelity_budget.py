"""The search for the most saving that keeps a fidelity, without fitting anything; and how the shortfall is measured."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import Residual, settled
from torch import Tensor, nn

from convrewrite.calibration.batches import Calibration
from convrewrite.conv import Cost
from convrewrite.errors import PlanError
from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.meanings.kinds import Meaning, tell
from convrewrite.planning.allocation import Allocation, FittedPlan, allocate
from convrewrite.planning.costs import Counted
from convrewrite.planning.curves import Scored, Surveyed
from convrewrite.planning.fidelity_budget import TRIALS, _flips, require_evaluable, search
from convrewrite.planning.fidelity_budget import shortfall as shortfall_of
from convrewrite.rewriting.front_to_back import Rewritten
from convrewrite.rules.options import search_spaces
from convrewrite.rules.schema import Protect, Rule
from convrewrite.settings import Keep
from convrewrite.structures.discovery import discover

X = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def frontier() -> tuple[tuple[Surveyed, ...], Counted]:
    """Sites with every other rank of two structures, and effects that nobody measured."""
    model = settled(Residual(16))
    rule = Rule(name="r", structures=("channel", "asymmetric"), protect=Protect(min_channels=0, min_mac_share=0))
    sites = find_sites(model, (X,), trace(model))
    found = []
    for index, space in enumerate(search_spaces(sites, [rule], discover())):
        options = []
        for candidate in (rank_range.at(rank) for rank_range in space.rank_ranges for rank in rank_range.ranks[::2]):
            left = candidate.cost.macs / space.site.cost.macs
            effect = 1e-3 * (1 + index) * (1.05 - left) ** 4
            options += [Scored(candidate, effect, effect, False)] if left < 1 else []
        found.append(Surveyed(space.site, tuple(options), reason=space.reason))
    return tuple(found), Counted(Cost(10_000, sum(site.cost.macs for site in sites)))


class Plan(nn.Module):
    """Stands for a model that was rewritten by an allocation."""

    def __init__(self, allocation: Allocation) -> None:
        super().__init__()
        self.allocation = allocation


class Trials:
    """Fits nothing; the shortfall of a plan is what a test says."""

    def __init__(self, truth: Callable[[Allocation], float]) -> None:
        self.truth = truth
        self.parts: list[float] = []
        self.found: dict[float, float] = {}

    def attempt(self, allocation: Allocation) -> Rewritten:
        self.parts.append(allocation.part("macs"))
        return Rewritten(Plan(allocation), ())

    def shortfall(self, model: nn.Module) -> float:
        assert isinstance(model, Plan)
        lost = self.truth(model.allocation)
        self.found[model.allocation.part("macs")] = lost
        return lost

    def search(self, frontier: tuple[tuple[Surveyed, ...], Counted], keep: Keep) -> FittedPlan:
        return search(*frontier, keep, self.attempt, self.shortfall)


def least_part(frontier: tuple[tuple[Surveyed, ...], Counted], allowed: Callable[[Allocation], bool]) -> float:
    """The smallest part of the MACs at which a plan is allowed, to a thousandth; the more is left, the less is lost."""
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        try:
            fine = allowed(allocate(frontier[0], {"macs": middle}, frontier[1]))
        except PlanError:
            fine = False
        low, high = (low, middle) if fine else (middle, high)
    return high


@pytest.mark.parametrize(
    ("keep", "factor", "power"),
    [
        (Keep("agreement", 0.99), 0.2, 0.5),  # as the first guess has it
        (Keep("agreement", 0.99), 1.0, 0.4),
        (Keep("agreement", 0.995), 0.05, 0.7),
        (Keep("error", 0.004), 1.0, 0.5),
        (Keep("error", 0.004), 0.05, 0.4),
        (Keep("error", 0.05), 20.0, 0.7),
    ],
    ids=str,
)
def test_it_ends_above_the_limit_near_the_most_saving_after_few_trials(
    keep: Keep, factor: float, power: float, frontier: tuple[tuple[Surveyed, ...], Counted]
) -> None:
    allowed = keep.limit if keep.measure == "error" else 1 - keep.limit

    def truth(allocation: Allocation) -> float:
        return factor * allocation.effect**power

    trials = Trials(truth)
    found = trials.search(frontier, keep)
    best = least_part(frontier, lambda a: truth(a) <= allowed)
    assert found.loss <= allowed
    assert found.loss == truth(found.allocation)
    assert found.allocation.part("macs") == min(part for part, lost in trials.found.items() if lost <= allowed)
    assert isinstance(found.rewritten.model, Plan)
    assert found.rewritten.model.allocation is found.allocation
    assert len(trials.parts) <= TRIALS
    assert found.allocation.part("macs") <= 1.06 * best


def test_a_measurement_that_is_noisy_still_ends_above_the_limit(
    frontier: tuple[tuple[Surveyed, ...], Counted],
) -> None:
    noise = iter([1.6, 0.5, 1.4, 0.7, 1.2, 0.9, 1.0])
    told: dict[float, float] = {}

    def truth(allocation: Allocation) -> float:
        told[allocation.part("macs")] = 0.3 * allocation.effect**0.5 * next(noise)
        return told[allocation.part("macs")]

    found = Trials(truth).search(frontier, Keep("agreement", 0.99))
    assert found.loss <= 0.01 + 1e-12
    assert found.allocation.part("macs") == min(part for part, lost in told.items() if lost <= 0.01)


def test_where_nothing_is_lost_everything_is_saved(frontier: tuple[tuple[Surveyed, ...], Counted]) -> None:
    trials = Trials(lambda _allocation: 0.0)
    found = trials.search(frontier, Keep("agreement", 0.99))
    assert found.allocation.part("macs") <= 1.04 * least_part(frontier, lambda _allocation: True)
    assert len(trials.parts) <= 4


def test_outputs_that_differ_though_no_effect_is_foreseen_end_the_search(
    frontier: tuple[tuple[Surveyed, ...], Counted],
) -> None:
    harmless = tuple(
        replace(e, options=tuple(Scored(o.candidate, 0.0, 0.0, False) for o in e.options)) for e in frontier[0]
    )
    with pytest.raises(PlanError, match=r"shortfall is 0\.5, allowed is 0\.01;"):
        Trials(lambda _allocation: 0.5).search((harmless, frontier[1]), Keep("agreement", 0.99))


def test_where_there_is_nothing_to_save_nothing_is_rewritten(frontier: tuple[tuple[Surveyed, ...], Counted]) -> None:
    entries = tuple(replace(entry, options=()) for entry in frontier[0])
    trials = Trials(lambda allocation: float(allocation.effect > 0))
    found = trials.search((entries, frontier[1]), Keep("agreement", 0.99))
    assert found.allocation.part("macs") == 1
    assert len(trials.parts) == 1


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (Keep("agreement", 0.98), "keeps a top-1 agreement of at least 0.98: .* shortfall is 0.5, allowed is 0.02;"),
        (Keep("error", 0.1), "keeps a relative output error of at most 0.1: .* shortfall is 0.5, allowed is 0.1;"),
    ],
    ids=["agreement", "error"],
)
def test_what_cannot_be_kept_says_what_was_lost(
    keep: Keep, words: str, frontier: tuple[tuple[Surveyed, ...], Counted]
) -> None:
    trials = Trials(lambda _allocation: 0.5)
    with pytest.raises(PlanError, match=rf"no plan that was tried {words} ask for less, give more .* other rules"):
        trials.search(frontier, keep)
    assert len(trials.parts) <= TRIALS
    assert trials.parts[-1] > 0.9, "nearly nothing was rewritten in the end"


# --- how the shortfall is measured


def test_what_ignores_its_inputs_is_beyond_any_error_that_is_allowed() -> None:
    values = {"output.0": Meaning("values", "")}
    data = Calibration(*numbered(40, 20), "data", "a test")
    kelvin = 300 + torch.randn(60, 1, dtype=torch.float64)
    keep = Keep("error", 0.05)
    near, constant = (
        shortfall_of(Table(kelvin), Table(found), data, keep, values)
        for found in (kelvin + 0.1, torch.full_like(kelvin, 300.0))
    )
    assert near < 0.05 < constant


def scores(count: int, classes: int = 4) -> Tensor:
    return torch.randn(count, classes, dtype=torch.float64)


class Table(nn.Module):
    """Gives each of the numbered inputs its row."""

    def __init__(self, *tables: Tensor) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, index: Tensor) -> tuple[Tensor, ...]:
        return tuple(table[index[:, 0].long()] for table in self.tables)


def meanings_of(original: nn.Module, data: Calibration) -> dict[str, Meaning]:
    return tell(original, data.held_out or data.fit)


def shortfall(original: nn.Module, rewritten: nn.Module, data: Calibration, keep: Keep) -> float:
    return shortfall_of(original, rewritten, data, keep, meanings_of(original, data))


def numbered(*counts: int) -> tuple[tuple[tuple[Tensor, ...], ...], ...]:
    """Batches of up to eight inputs, numbered on from one part to the next."""
    numbers = torch.arange(sum(counts), dtype=torch.float32)[:, None]
    return tuple(tuple((batch,) for batch in part.split(8)) for part in numbers.split(counts))


def flips_one_by_one(before: Tensor, after: Tensor, others: Tensor) -> float:
    """Of all gaps and all changes of a gap, the share of pairs in which the change closes the gap."""
    changes = []
    for a, b in zip(before, after, strict=True):
        first, second = a.argsort(descending=True)[:2].tolist()
        changes.append(float((b[first] - b[second]) - (a[first] - a[second])))
    gaps = [float(row.topk(2).values[0] - row.topk(2).values[1]) for row in torch.cat([before, others])]
    pairs = [(gap, change) for gap in gaps for change in changes]
    return sum(gap + change < 0 for gap, change in pairs) / len(pairs)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_flips_are_counted_as_one_by_one(spread: float) -> None:
    before, others = scores(12), scores(30)
    after = before + spread * scores(12)
    found = _flips([(before[:5], after[:5]), (before[5:], after[5:])], [others[:20], others[20:]])
    assert found == pytest.approx(flips_one_by_one(before, after, others))
    assert (found > 0) == (spread > 0)
    assert _flips([(before, after)], []) == pytest.approx(flips_one_by_one(before, after, scores(0)))


def test_rows_without_a_class_do_not_count_and_those_with_one_alone_never_flip() -> None:
    before, after = scores(12), scores(12)
    none, one = torch.full((7, 4), math.nan), torch.tensor([[0.0, *[-math.inf] * 3]])
    others = torch.cat([after, none])
    found = _flips([(torch.cat([before, none]), torch.cat([after, none]))], [others])
    assert found == _flips([(before, after)], [after])
    assert _flips([(one, one), (none, none)], [none]) == _flips([(none, none)], []) == 0
    assert _flips([(before, before * math.nan)], []) == 1


def test_a_gap_that_closes_exactly_is_no_flip() -> None:
    before = torch.tensor([[1.0, 0.0]])
    assert _flips([(before, torch.tensor([[0.5, 0.5]]))], []) == 0
    assert _flips([(before, torch.tensor([[0.4, 0.5]]))], []) == 1


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_shortfall_is_the_worse_of_what_is_measured_and_estimated(spread: float) -> None:
    before = scores(60)
    after = before + spread * scores(60)
    fit, held_out = numbered(40, 20)
    data = Calibration(fit, held_out, "data", "a test")
    lost = float((before[40:].argmax(1) != after[40:].argmax(1)).double().mean())
    estimate = flips_one_by_one(before[40:], after[40:], before[:40])
    found = shortfall(Table(before), Table(after), data, Keep("agreement", 0.9))
    assert found == pytest.approx(max(lost, estimate))
    assert shortfall(Table(before), Table(before), data, Keep("agreement", 0.9)) == 0


def test_the_shortfall_is_that_of_the_worst_output() -> None:
    good, bad = scores(30), scores(30)
    changed = bad + scores(30)
    fit, held_out = numbered(20, 10)
    data = Calibration(fit, held_out, "data", "a test")
    keep, limit = Keep("agreement", 0.9), Keep("error", 0.1)
    both = shortfall(Table(good, bad), Table(good, changed), data, keep)
    assert both == pytest.approx(shortfall(Table(bad), Table(changed), data, keep))
    error = float((changed - bad)[20:].norm() / bad[20:].norm())
    assert shortfall(Table(good, bad), Table(good, changed), data, limit) == pytest.approx(error)


def test_without_held_out_inputs_it_is_measured_on_the_others() -> None:
    before = scores(24)
    after = before + scores(24)
    (fit,) = numbered(24)
    data = Calibration(fit, (), "data", "a test")
    lost = float((before.argmax(1) != after.argmax(1)).double().mean())
    estimate = flips_one_by_one(before, after, scores(0))
    assert shortfall(Table(before), Table(after), data, Keep("agreement", 0.9)) == pytest.approx(max(lost, estimate))


# --- what is known before the long work


def test_there_must_be_inputs_to_measure_on() -> None:
    nothing = Calibration((), (), "weights only", "none")
    for keep in (Keep("agreement", 0.9), Keep("error", 0.1)):
        with pytest.raises(PlanError, match=r"keep: needs inputs to measure on, and there are none; .*--calib"):
            require_evaluable(nothing, keep, {"output": Meaning("logits", "")})


def test_agreement_needs_class_scores() -> None:
    fit, held_out = numbered(8, 8)
    data = Calibration(fit, held_out, "data", "a test")
    maps = torch.randn(16, 3, 2, 2)
    message = (
        r"keep: an agreement needs class scores.*output\.0 was taken for values: .* error=0\.02 .*--output NAME=logits"
    )
    with pytest.raises(PlanError, match=message):
        require_evaluable(data, Keep("agreement", 0.9), meanings_of(Table(maps), data))
    with pytest.raises(PlanError, match=message):
        shortfall(Table(maps), Table(maps), data, Keep("agreement", 0.9))
    require_evaluable(data, Keep("error", 0.1), meanings_of(Table(maps), data))
    require_evaluable(data, Keep("agreement", 0.9), meanings_of(Table(maps, scores(16)), data))
    before, after, keep = scores(16), scores(16), Keep("agreement", 0.9)
    alone = shortfall(Table(before), Table(after), data, keep)
    assert alone > 0
    assert shortfall(Table(maps, before), Table(100 * maps.flip(0), after), data, keep) == alone
