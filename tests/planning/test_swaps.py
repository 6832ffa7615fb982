"""A fitted plan is checked as a whole, and bettered by swaps that lower its measured effect."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from networks import Residual, TwoNames, natural, settled
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.calibration.batches import Calibration
from convrewrite.calibration.choose import evaluation_inputs
from convrewrite.conv import Cost
from convrewrite.errors import FitError
from convrewrite.fitting import Fit
from convrewrite.graph import Site
from convrewrite.pipeline.prepare import prepare
from convrewrite.planning import swaps
from convrewrite.planning.allocation import Allocation, FittedPlan, allocate
from convrewrite.planning.costs import Counted
from convrewrite.planning.curves import MOST_EFFECT, Scored, Surveyed
from convrewrite.planning.effects import Evaluator
from convrewrite.planning.effort import FAST
from convrewrite.planning.sensitivities import survey
from convrewrite.planning.swaps import evaluate, swap
from convrewrite.progress import Stopwatch
from convrewrite.rewriting.front_to_back import Rewritten, rewrite
from convrewrite.rewriting.propagation import Propagation
from convrewrite.rewriting.site_fit import SiteFit
from convrewrite.rewriting.work import Work
from convrewrite.rules.schema import Protect, Rule
from convrewrite.settings import Settings
from convrewrite.stored.result_cache import Entry, RunCache
from convrewrite.structures.structure import Option, Structure

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


@pytest.fixture(scope="module")
def planned() -> Iterator[Case]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = case_of(Residual(12))
    before = state_of(case)
    yield case
    after = state_of(case)
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "a plan stays as it was fitted"


@pytest.fixture
def case(planned: Case) -> Case:
    return Case(planned.work, planned.checked)


def state_of(case: Case) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in case.checked.rewritten.model.state_dict().items()}


def case_of(network: nn.Module) -> Case:
    parts = natural(24, 3, 12, 12, torch.float32).split(4)
    data = Calibration(tuple((p,) for p in parts[:4]), tuple((p,) for p in parts[4:]), "data", "a test")
    rule = Rule(
        name="r", structures=("channel", "asymmetric"), protect=Protect(stem=False, min_channels=0, min_mac_share=0)
    )
    prepared = prepare(settled(network), (parts[0][:1],), [rule])
    evaluation = evaluation_inputs((parts[0][:1],), data).with_meanings(prepared.original, {})
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


def test_of_options_that_cannot_be_fitted_none_is_taken(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured all the same."""
    allocation, real, failed = case.checked.allocation, SiteFit.fit, list[Option]()
    own = [scored.candidate.option for scored in allocation.chosen if scored is not None]

    def fit_some(self: SiteFit, structure: Structure, option: Option, iterations: int | None = None) -> Fit:
        if option in own or len(failed) == 1:
            return real(self, structure, option, iterations)
        failed.append(option)
        raise FitError(self.site.name, "expected numbers")

    monkeypatch.setattr(SiteFit, "fit", fit_some)
    nearby = swaps._survey_nearby(case.work, case.checked, tuple(BUDGET))
    (entry,) = [entry for entry in nearby if failed[0] in [s.candidate.option for s in entry.options]]
    effects = {scored.candidate.option: scored.effect for scored in entry.options}
    assert effects.pop(failed[0]) == MOST_EFFECT
    assert len(effects) > 1
    assert all(effect < MOST_EFFECT for effect in effects.values())


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


def test_a_plan_that_oversteps_its_budget_a_little_stays(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "_survey_nearby", lambda _work, fitted, _resources: fitted.allocation.surveyed)
    tight = {"macs": 0.05}
    assert swap(case.work, case.checked, tight, anything, case.attempt) is case.checked
    assert case.fitted == []


def in_int8(case: Case) -> Case:
    """The same, asked for int8."""
    work = replace(case.work, settings=replace(case.work.settings, int8=True))
    return Case(work, evaluate(work, case.checked.allocation, case.checked.rewritten))


def test_for_int8_a_plan_is_evaluated_with_its_sites_rounded_and_stays_float32(case: Case) -> None:
    before = state_of(case)
    found = in_int8(case).checked
    assert found.loss != case.checked.loss
    assert found.loss == pytest.approx(case.checked.loss, rel=0.5), "8 bits do less than what is left out"
    assert found.rewritten is case.checked.rewritten
    after = found.rewritten.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(part._forward_pre_hooks for part in found.rewritten.model.modules())


def test_for_int8_a_site_rounds_under_whichever_name_it_is_called() -> None:
    case = case_of(TwoNames())
    outcomes = [o for o in case.checked.rewritten.outcomes if o.candidate is not None]
    (shared,) = (o for o in outcomes if o.site.name in ("encoder.conv", "alias"))
    model = swaps._sites_in_int8(Rewritten(case.checked.rewritten.model, (shared,)))
    assert model.alias is model.encoder.conv
    assert any(part._forward_pre_hooks for part in model.alias.modules())


def test_for_int8_everything_that_is_tried_is_rounded_and_others_are_tried_too(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, tried = list[nn.Module](), list[Scored]()
    effect, surveyed = Evaluator.effect, swaps._Effects.surveyed

    def measured(self: Evaluator, site: Site, module: nn.Module) -> float:
        modules.append(module)
        return effect(self, site, module)

    def noted(self: swaps._Effects, entry: Surveyed, options: list[Scored]) -> Surveyed:
        tried.extend(options)
        return surveyed(self, entry, options)

    monkeypatch.setattr(Evaluator, "effect", measured)
    monkeypatch.setattr(swaps._Effects, "surveyed", noted)
    monkeypatch.setattr(swaps, "_others", lambda entry, scored, resources: [entry.options[-1]])
    asked = in_int8(case)
    found = swap(asked.work, asked.checked, BUDGET, anything, asked.attempt)
    assert found.loss <= asked.checked.loss
    assert modules
    assert all(any(part._forward_pre_hooks for part in module.modules()) for module in modules)
    pairs = zip(case.checked.allocation.surveyed, case.checked.allocation.chosen, strict=True)
    last = [entry.options[-1] for entry, scored in pairs if scored is not None]
    assert last
    assert all(option in tried for option in last)


def costing(case: Case, structure: str, macs: float, effect: float, parameters: float = 1.0) -> tuple[Surveyed, Scored]:
    """A site, and an option for it that costs so much, in units of which its neighbours are parts."""
    entry = next(entry for entry in case.checked.allocation.surveyed if entry.options)
    known = entry.options[0]
    option = replace(known.candidate.option, structure=structure, setting=(("macs", round(macs * 10_000)),))
    cost = Cost(round(parameters * 10_000), round(macs * 10_000))
    return entry, replace(known, candidate=replace(known.candidate, option=option, cost=cost), effect=effect)


def test_for_int8_the_best_option_of_every_other_structure_at_about_the_same_cost_is_tried(case: Case) -> None:
    entry, chosen = costing(case, "cp", 1.0, 0.1)
    _, best = costing(case, "tucker", 1.09, 0.2)
    rest = [
        costing(case, *given)[1]
        for given in (("cp", 1.01, 0.05), ("tucker", 0.95, 0.3), ("tucker", 1.2, 0.1), ("grouped", 0.8, 0.1))
    ]
    assert swaps._others(replace(entry, options=(chosen, *rest, best)), chosen, ["macs"]) == [best]


def test_neighbours_cost_a_step_less_and_a_step_more_and_the_best_of_them_harm_least_for_their_cost(case: Case) -> None:
    entry, chosen = costing(case, "cp", 1.0, 0.1)
    less, more, fewer = (
        costing(case, *given)[1] for given in (("cp", 0.65, 0.2), ("cp", 1.35, 0.1), ("tucker", 1.02, 9.0, 0.8))
    )
    # Products of effect and cost: 0.13 and 0.135 of the best; 0.135 of what costs 0.9; 0.136 of what costs 1.15.
    rest = [
        costing(case, *given)[1]
        for given in (
            ("cp", 0.9, 0.15), ("cp", 1.15, 0.1183), ("cp", 0.59, 0.0), ("cp", 0.95, 0.0), ("cp", 1.05, 0.0), ("cp", 1.41, 0.0),
        )
    ]  # fmt: skip
    options = (chosen, *rest, fewer, more, less)
    assert swaps._neighbours(replace(entry, options=options), chosen, ["macs"]) == [less, more]
    assert swaps._neighbours(replace(entry, options=options), chosen, ["macs", "params"]) == [less, more, fewer]
    assert swaps._neighbours(replace(entry, options=(chosen,)), chosen, ["macs"]) == []


@pytest.mark.parametrize(
    ("facts", "tensors", "known"),
    [
        ([0.5, 0.25, 0.125], {}, True),
        ([0.5], {}, True),
        ([0.5, 0.25], {}, False),
        ([], {}, False),
        ([0.5, 0.25, 1], {}, False),
        ([0.5, 0.25, float("inf")], {}, False),
        ({"0": 0.5}, {}, False),
        ([0.5], {"0": torch.zeros(1)}, False),
    ],
)
def test_kept_effects_are_one_of_every_option_or_of_the_first(
    case: Case, facts: list[float], tensors: dict[str, Tensor], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunCache, "get", lambda self, kind, asked: Entry(facts, tensors))
    effects = swaps._Effects(case.work, Propagation.__new__(Propagation), "")
    assert effects._known((), 3) == (facts if known else None)
    monkeypatch.setattr(RunCache, "get", lambda self, kind, asked: None)
    assert effects._known((), 3) is None
