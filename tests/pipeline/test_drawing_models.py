"""Networks that draw random numbers in eval mode, such as a variational autoencoder: runs on the same inputs draw the same."""

import copy

import pytest
import torch
from networks import natural, relative, state_bytes
from torch import Tensor, nn

from convrewrite import apply, optimize, recover, verify
from convrewrite.rules.schema import Protect, Rule

EVERYWHERE = Protect(stem=False, min_channels=0, min_mac_share=0)
HALVED = Rule(name="halved", structures=("asymmetric",), ratio=0.7, protect=EVERYWHERE)
OPTIONS = {"measure": False, "resume": False, "refine": False}
RANK = 4


class Sampled(nn.Module):
    """Its latents are drawn around a mean; both kernels behind them are of such a low rank that they can be rewritten exactly."""

    def __init__(self, *, branching: bool = False) -> None:
        super().__init__()
        self.branching = branching
        self.encode = nn.Conv2d(3, 8, 1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        for conv in (self.first, self.second):
            kernel = torch.einsum("riy,rox->oiyx", torch.randn(RANK, 8, 3), torch.randn(RANK, 8, 3))
            conv.weight = nn.Parameter(kernel / 12)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.encode(x)
        if self.branching and float(x.detach().abs().sum()) < 0:
            mean = -mean
        latent = mean + torch.randn_like(mean)
        return self.second(self.first(latent).relu() + torch.rand(len(x), 1, 1, 1))


def sampled(*, branching: bool = False) -> Sampled:
    torch.manual_seed(0)
    return Sampled(branching=branching).eval()


@pytest.mark.parametrize("branching", [False, True], ids=["followed", "not followed"])
def test_fits_and_fidelity_are_those_of_the_same_draws(branching: bool) -> None:
    model, images = sampled(branching=branching), natural(80, 3, 12, 12, torch.float32)
    result = optimize(model, images[:1], [HALVED], images, **OPTIONS)
    rows = {row.name: row for row in result.report.sites}
    assert rows["first"].action == rows["second"].action == "rewritten"
    assert all(rows[name].output_error is not None and rows[name].output_error < 1e-3 for name in ("first", "second"))
    assert result.report.fidelity[0].relative_error < 1e-3
    torch.manual_seed(7)
    expected = model(images)
    torch.manual_seed(7)
    assert relative(result.model(images), expected) < 1e-3


def test_an_applied_plan_draws_what_was_drawn_for_it() -> None:
    model, images = sampled(), natural(20, 3, 12, 12, torch.float32)
    result = optimize(model, images[:1], [HALVED], images, seed=5, **OPTIONS)
    again = apply(model, images[:1], result.plan, images, measure=False, refine=False)
    assert state_bytes(again.model) == state_bytes(result.model)


def test_a_copy_is_verified_as_the_same() -> None:
    model = sampled()
    found = verify(model, copy.deepcopy(model), natural(8, 3, 12, 12, torch.float32))
    assert found.parity.passed and found.fidelity.outputs[0].relative_error == 0


def test_a_budget_and_a_recovery_see_what_a_site_does_and_not_what_is_drawn() -> None:
    model, images = sampled(), natural(80, 3, 12, 12, torch.float32)
    result = optimize(model, images[:1], [HALVED], images, budget={"macs": 0.5}, **OPTIONS)
    better = recover(result, model, images, epochs=1, measure=False, features=0.0)
    told = better.report.recovered
    assert told is not None and told.before == pytest.approx(result.report.fidelity[0].relative_error ** 2, rel=0.5)
    assert told.after <= told.before < 0.1
