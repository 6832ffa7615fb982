"""A fitted plan is checked as a whole, and bettered by swaps that lower its measured effect."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from networks import Residual, natural, settled
from torch import nn
from torch.nn import functional as F

from convrewrite.calibration.batches import Calibration
from convrewrite.calibration.choose import evaluation_inputs
from convrewrite.pipeline.prepare import prepare
from convrewrite.planning import swaps
from convrewrite.planning.allocation import Allocation, FittedPlan, allocate
from convrewrite.planning.costs import Counted
from convrewrite.planning.curves import Surveyed
from convrewrite.planning.effort import FAST
from convrewrite.planning.sensitivities import survey
from convrewrite.planning.swaps import evaluate, swap
from convrewrite.progress import Stopwatch
from convrewrite.rewriting.front_to_back import Rewritten, rewrite
from convrewrite.rewriting.work import Work
from convrewrite.rules.schema import Protect, Rule
from convrewrite.settings import Settings

BUDGET = {"macs": 0.5}


@dataclass
class Case:
    """A plan of a small network that was fitted, and what is fitted afterwards."""

    work: Work
    checked: FittedPlan
    fitted: list[Allocation] = field(default_factory=list)

    def attempt(self, allocation: Allocation) -> Rewritten:
        self.fitted.append(allocation)
        return fit(self.work, allocation)


def anything(_allocation: Allocation) -> bool:
    return True


def fit(work: Work, allocation: Allocation) -> Rewritten:
    return rewrite(work, allocation.shortlists())


@pytest.fixture
def case() -> Case:
    parts = natural(24, 3, 12, 12, torch.float32).split(4)
    data = Calibration(tuple((p,) for p in parts[:4]), tuple((p,) for p in parts[4:]), "data", "a test")
    rule = Rule(
        name="r", structures=("channel", "asymmetric"), protect=Protect(stem=False, min_channels=0, min_mac_share=0)
    )
    prepared = prepare(settled(Residual(12)), (parts[0][:1],), [rule])
    evaluation = evaluation_inputs((parts[0][:1],), data).told(prepared.original, {})
    work = Work(prepared, data, evaluation, {}, Settings(measure=False, fast=True), lambda *_: None, Stopwatch())
    allocation = allocate(survey(work, effort=FAST, latency_table=None), BUDGET, Counted(prepared.totals))
    return Case(work, evaluate(work, allocation, fit(work, allocation)))


def divergence(work: Work, model: nn.Module) -> float:
    with torch.no_grad():
        pairs = [(work.prepared.model(*b).double(), model(*b).double()) for b in work.data.held_out]
    a, b = (torch.cat(side).log_softmax(1) for side in zip(*pairs, strict=True))
    return float(F.kl_div(b, a, reduction="batchmean", log_target=True))


def test_the_checked_effect_is_that_of_the_whole_plan_on_held_out_inputs(case: Case) -> None:
    assert case.checked.loss == pytest.approx(divergence(case.work, case.checked.rewritten.model), rel=1e-4)


def test_swaps_never_do_more_harm_and_keep_the_budget(case: Case) -> None:
    found = swap(case.work, case.checked, BUDGET, anything, case.attempt)
    assert found.loss <= case.checked.loss
    assert found.allocation.part("macs") <= BUDGET["macs"]
    assert found.loss == pytest.approx(divergence(case.work, found.rewritten.model), rel=1e-4)
    assert len(case.fitted) <= 1
    assert found is case.checked or found.allocation == case.fitted[0]
    known = [scored for entry in case.checked.allocation.surveyed for scored in entry.options]
    assert all(scored in known for scored in found.allocation.chosen if scored), "effects are told as they are alone"
    changed = zip(found.allocation.chosen, case.checked.allocation.chosen, strict=True)
    assert all((new is None) == (old is None) for new, old in changed)


def test_where_no_swap_helps_nothing_is_fitted_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmoved(_work: Work, checked: FittedPlan, _resources: object) -> tuple[Surveyed, ...]:
        """Every other option turned out to be worse, in the whole plan as alone."""
        pairs = zip(checked.allocation.surveyed, checked.allocation.chosen, strict=True)
        return tuple(
            replace(
                entry,
                options=tuple(replace(s, effect=s.effect * (1.5 if s is chosen else 100)) for s in entry.options),
                must_change=True,
            )
            if chosen
            else replace(entry, options=())
            for entry, chosen in pairs
        )

    monkeypatch.setattr(swaps, "_survey_nearby", unmoved)
    assert swap(case.work, case.checked, BUDGET, anything, case.attempt) is case.checked
    assert case.fitted == []


def test_a_swap_that_does_more_harm_or_takes_longer_in_the_end_is_not_taken(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misled(_work: Work, checked: FittedPlan, _resources: object) -> tuple[Surveyed, ...]:
        """The cheapest options look harmless."""
        pairs = zip(checked.allocation.surveyed, checked.allocation.chosen, strict=True)
        return tuple(
            replace(
                entry,
                options=tuple(replace(s, effect=float(s.candidate.cost.macs)) for s in entry.options),
                must_change=True,
            )
            if chosen
            else replace(entry, options=())
            for entry, chosen in pairs
        )

    monkeypatch.setattr(swaps, "_survey_nearby", misled)
    assert swap(case.work, case.checked, BUDGET, anything, case.attempt) is case.checked
    assert len(case.fitted) == 1

    asked: list[Allocation] = []
    too_slow = lambda allocation: bool(asked.append(allocation))  # noqa: E731
    assert swap(case.work, case.checked, BUDGET, too_slow, case.attempt) is case.checked
    assert asked == case.fitted[:1], "what measures too slow as a whole is not fitted at all"
    assert len(case.fitted) == 1


def test_a_plan_that_oversteps_its_budget_a_little_stays(case: Case) -> None:
    tight = {"macs": 0.05}
    assert swap(case.work, case.checked, tight, anything, case.attempt) is case.checked
    assert case.fitted == []
