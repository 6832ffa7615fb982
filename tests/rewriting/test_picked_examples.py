"""Convolutions that get only the examples which an earlier convolution picks: the rewritten network picks others."""

import pytest
import torch
from networks import natural, relative
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite import Result, optimize
from convrewrite.conv import ConvSpec
from convrewrite.fitting.moments import Accumulator
from convrewrite.rewriting.samples import Sample
from convrewrite.rules.schema import Protect, Rule

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.8)
X = natural(48, 3, 10, 10, torch.float32)


class Experts(nn.Module):
    """A second convolution for the examples of which the first says more than ``least``. ``traced``: by operators that a graph
    has, where it is not assigned in place."""

    def __init__(self, traced: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.expert, self.traced = nn.Conv2d(8, 8, 3, padding=1), traced
        self.register_buffer("least", torch.zeros(()))
        with torch.no_grad():
            self.least.copy_(self.said(F.relu(self.first(X))).median())

    def said(self, x: Tensor) -> Tensor:
        return self.gate(x).mean((1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        # the first example always gets there: the one that sites are found with
        said = torch.cat([torch.full_like(self.said(x)[:1], 1e9), self.said(x)[1:]])
        found, picked = torch.zeros_like(x), torch.nonzero(said > self.least)[:, 0]
        if self.traced:
            return found.index_copy(0, picked, self.expert(x[picked]))
        found[picked] = self.expert(x[picked])
        return found


def rewritten(model: nn.Module) -> Result:
    return optimize(model.eval(), X[:1], [RULE], [X[:13], X[13:24], X[24:]], measure=False, fast=True)


@pytest.mark.parametrize("traced", [True, False])
def test_they_are_fitted_to_what_the_original_picks(traced: bool) -> None:
    model = Experts(traced)
    result = rewritten(model)
    row = {row.name: row for row in result.report.sites}["expert"]
    assert row.action == "rewritten"
    assert row.output_error is not None and row.output_error < 0.5
    with torch.no_grad():
        given = F.relu(model.first(X))
        assert relative(result.model.get_submodule("expert")(given), model.expert(given)) < 0.5


def test_other_shapes_and_parts_of_an_example_are_the_originals() -> None:
    one, other = torch.zeros(6, 2, 3, 3), torch.ones(6, 2, 3, 3)
    sample = Sample(0, other, one, original_skip=one, rewritten_skip=other)
    assert sample.of_the_same_examples(one, 3) is sample
    for examples, original in ((3, torch.zeros(3, 2, 3, 3)), (4, one)):
        found = sample.of_the_same_examples(original, examples)
        assert found.rewritten is original
        assert torch.equal(found.wanted, one)


@pytest.mark.parametrize("keep", [True, False])
def test_a_batch_of_which_nothing_gets_there_counts_for_nothing(keep: bool) -> None:
    x, y = torch.randn(2, 4, 2, 5, 5).unbind()
    spec = ConvSpec.of(nn.Conv2d(2, 2, 3, padding=1))
    alone, after = (Accumulator(spec, 100, 0, keep=keep, limit=100, device=torch.device("cpu")) for _ in range(2))
    after.add(x[:0], y[:0])
    for accumulator in (alone, after):
        accumulator.add(x, y)
    for one, two in zip(alone.result(), after.result(), strict=True):
        assert torch.equal(one.cov_p, two.cov_p)
