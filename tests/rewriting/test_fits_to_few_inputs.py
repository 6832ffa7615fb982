"""Few inputs: what is fitted to them holds for others no worse than the weights alone, and an overfit is seen."""

import copy
from dataclasses import replace

import pytest
import torch
from goals import unexplained
from networks import natural, settled
from torch import nn

from convrewrite.calibration.batches import Calibration
from convrewrite.fitting import Evidence, few_inputs
from convrewrite.fitting.found import Fit
from convrewrite.fitting.targets import Ground
from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.progress import Stopwatch
from convrewrite.rewriting.behind_relu import BehindRelu
from convrewrite.rewriting.propagation import Propagation
from convrewrite.rewriting.site_fit import SiteFit
from convrewrite.rules.options import Candidate
from convrewrite.rules.schema import Require, Rule
from convrewrite.structures.algebra import composed_kernel
from convrewrite.structures.discovery import discover
from convrewrite.structures.lowering import make_option, option_cost
from convrewrite.structures.structure import Option

CHANNEL = discover()["channel"]
SIZE = 6
"""Height and width of an input: 36 positions, for 108 numbers in a patch of the second convolution."""


class Two(nn.Module):
    """Two convolutions, the second with a ReLU behind it or without."""

    def __init__(self, rectified: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.rectified = rectified

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.tanh(self.first(x)))
        return torch.relu(y) if self.rectified else y


def second_site(count: int, held_out: int = 40, *, disturb: float = 0.5, rectified: bool = False) -> SiteFit:
    """The second convolution, fitted to ``count`` inputs, behind a first one whose kernel was ``disturbed``."""
    model = settled(Two(rectified).double())
    x = natural(count + held_out, 3, SIZE, SIZE, torch.float64)
    calibration = Calibration(((x[:count],),), ((x[count:],),) if held_out else (), "data", "a test")
    first, second = find_sites(model, (x[:1],), trace(model))
    walk = Propagation(model, trace(model), [first, second], (*calibration.fit, *calibration.held_out), 1 << 30)
    other = copy.deepcopy(model.first)
    with torch.no_grad():
        other.weight += disturb * other.weight.std() * torch.randn_like(other.weight)
    assert walk.samples(first) is not None
    walk.replace(first, other)
    return SiteFit.of(walk, second, calibration, {}, 0, Stopwatch())


def option_of(site_fit: SiteFit, rank: int) -> Option:
    return make_option(CHANNEL, site_fit.site.spec, {"rank": rank})


def weights_alone(site_fit: SiteFit, option: Option) -> Fit:
    spec = site_fit.site.folded_spec
    evidence = Evidence.of(spec, site_fit.kernel, site_fit.seen, site_fit.unseen, 1, site_fit.roots)
    return evidence.from_weights(CHANNEL, option.parameters)


@pytest.mark.parametrize("count", [1, 2, 4, 16])
@pytest.mark.parametrize("rank", [2, 6, 11])
def test_no_fit_is_worse_than_the_weights_alone_on_inputs_never_seen(count: int, rank: int) -> None:
    site_fit = second_site(count)
    option = option_of(site_fit, rank)
    found = site_fit.fit(CHANNEL, option)
    best = site_fit.believed(CHANNEL, option, found)
    assert best.unexplained <= min(found.unexplained, weights_alone(site_fit, option).unexplained)


def test_an_overfit_is_seen_and_made_up_for() -> None:
    site_fit = second_site(2)
    option = option_of(site_fit, 11)
    found = site_fit.fit(CHANNEL, option)
    seen = site_fit.fit_error(CHANNEL, option, found)
    assert seen is not None
    assert found.error > 1.25 * seen, "this is an overfit"
    best = site_fit.believed(CHANNEL, option, found)
    assert best.error < 0.99 * found.error
    assert best.trusts, "with less trust in the data"


def test_the_weights_alone_stand_where_the_data_can_only_mislead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_inputs, "lesser_trusts", lambda *_: ())
    monkeypatch.setattr(few_inputs, "doubtful", lambda *_: True)
    site_fit = second_site(1)
    option = option_of(site_fit, 11)
    alone = weights_alone(site_fit, option)
    found = site_fit.fit(CHANNEL, option)
    misled = replace(found, unexplained=alone.unexplained * 1.01)
    best = site_fit.believed(CHANNEL, option, misled)
    assert all(torch.equal(a, b) for a, b in zip(best.kernels, alone.kernels, strict=True))
    assert (
        site_fit.believed(CHANNEL, option, replace(found, unexplained=alone.unexplained * 0.99)).kernels
        is found.kernels
    )


def test_without_room_the_data_is_believed_in_full_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    given = second_site(2)
    assert given.evidence is not None
    site_fit = replace(given, evidence=replace(given.evidence, room=False))
    option = option_of(site_fit, 11)
    monkeypatch.setattr(Ground, "target", lambda *_, **__: pytest.fail("there is no room for another target"))
    found = site_fit.fit(CHANNEL, option)
    best = site_fit.believed(CHANNEL, option, found)
    assert best.unexplained == min(found.unexplained, weights_alone(site_fit, option).unexplained)
    assert not best.trusts


def test_many_inputs_leave_the_fit_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_inputs, "fit", lambda *_, **__: pytest.fail("nothing else is to be fitted"))
    site_fit = second_site(64)
    option = option_of(site_fit, 6)
    found = site_fit.fit(CHANNEL, option)
    assert site_fit.believed(CHANNEL, option, found) is found


def test_without_held_out_inputs_nothing_can_be_doubted() -> None:
    site_fit = second_site(2, held_out=0)
    option = option_of(site_fit, 6)
    found = site_fit.fit(CHANNEL, option)
    assert site_fit.believed(CHANNEL, option, found) is found


def test_the_refit_behind_a_relu_goes_on_with_the_same_trust() -> None:
    site_fit = second_site(2, rectified=True)
    option = option_of(site_fit, 11)
    cost = option_cost(site_fit.site.folded_spec, CHANNEL.stages(site_fit.site.spec, {"rank": 11}), [(SIZE, SIZE)])
    candidate = Candidate(option, cost, Rule(name="r", structures=("channel",), ratio=0.5))
    [(_, best)] = site_fit.fit_all([candidate], {"channel": CHANNEL})
    assert best.trusts
    goals = site_fit.goals_of(best)
    assert not torch.equal(goals[0].target.covariance, site_fit.goals[0].target.covariance)
    _, before = BehindRelu(site_fit).rectify(CHANNEL, option, best)
    refitted, least = BehindRelu(site_fit).rectify(CHANNEL, option, best)
    assert least == before, "the same every time"
    assert least <= BehindRelu(site_fit).error(CHANNEL.stages(site_fit.site.spec, {"rank": 11}), best)
    assert refitted.kernels[0].isfinite().all()


def test_a_refit_behind_a_relu_keeps_the_limit_of_the_rule() -> None:
    site_fit = second_site(64, rectified=True)
    option = option_of(site_fit, 6)
    cost = option_cost(site_fit.site.folded_spec, CHANNEL.stages(site_fit.site.spec, {"rank": 6}), [(SIZE, SIZE)])

    def error(limit: float | None) -> float:
        require = Require(max_output_error=limit)
        candidate = Candidate(option, cost, Rule(name="r", structures=("channel",), ratio=0.5, require=require))
        _, best = BehindRelu(site_fit).best_of([(candidate, found)], {"channel": CHANNEL})
        return best.error

    found = site_fit.fit(CHANNEL, option)
    free = error(None)
    assert found.error < free == error(free), "what is lost below zero counts no more"
    limit = (found.error + free) / 2
    assert found.error <= error(limit) <= limit
    assert error(found.error) == found.error


def test_the_error_on_the_inputs_fitted_on_is_that_of_their_moments() -> None:
    site_fit = second_site(4)
    option = option_of(site_fit, 6)
    found = site_fit.fit(CHANNEL, option)
    kernel = composed_kernel(found.kernels, CHANNEL.stages(site_fit.site.spec, {"rank": 6}), 1)
    assert site_fit.fit_error(CHANNEL, option, found) == pytest.approx(unexplained(kernel, site_fit.seen[0]) ** 0.5)
    assert found.unexplained == pytest.approx(unexplained(kernel, site_fit.unseen[0]))


def test_of_a_huge_site_trust_is_chosen_before_its_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_inputs, "HUGE", 1)
    made = []
    fit = few_inputs.fit
    monkeypatch.setattr(few_inputs, "fit", lambda *args, **named: made.append(1) or fit(*args, **named))
    few, many = second_site(2), second_site(64)
    for site_fit in (few, many):
        option = option_of(site_fit, 11)
        assert site_fit.evidence is not None
        near = site_fit.rough(CHANNEL, option, [goal.to(torch.float32) for goal in site_fit.goals])
        found = site_fit.evidence.fit_large(CHANNEL, option.parameters, site_fit.goals, near)
        assert len(made) == (0 if site_fit is few else 1), (
            "what few inputs are not believed in goes on from the rough fit"
        )
        made.clear()
        assert bool(found.trusts) is (site_fit is few)
        assert found.unexplained <= weights_alone(site_fit, option).unexplained
        if site_fit is few:
            assert found.error < 0.99 * site_fit.fit(CHANNEL, option).error
        else:
            assert found.unexplained == site_fit.fit(CHANNEL, option).unexplained


def test_of_a_huge_site_with_few_positions_no_target_is_solved_for(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (second_site(count).evidence for count in (2, 64))
    assert few is not None and many is not None
    solved = few.goals()
    monkeypatch.setattr(few_inputs, "HUGE", 1)
    kernel = few.grounds[0].kernel.flatten(1)
    assert not torch.equal(solved[0].target.kernel, kernel)
    assert torch.equal(few.goals()[0].target.kernel, kernel)
    assert torch.equal(few.goals()[0].target.response, solved[0].target.response)
    assert not torch.equal(many.goals()[0].target.kernel, many.grounds[0].kernel.flatten(1))
