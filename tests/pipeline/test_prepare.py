"""What every run starts from."""

import pytest
import torch
from networks import Residual, macs_by_hooks
from torch import nn

from convrewrite.errors import RuleFileError, TraceError
from convrewrite.pipeline.prepare import prepare, whole_cost
from convrewrite.rules.schema import Rule
from convrewrite.structures.families.channel import Channel

X = torch.randn(2, 3, 16, 16)


class Renamed(Channel):
    """A structure of the caller's own."""

    name = "mine"


def test_the_whole_cost_is_all_parameters_and_the_macs_of_one_example() -> None:
    model = Residual().eval()
    found = whole_cost(model, (X,))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.macs == macs_by_hooks(model, X) + model.head.weight.numel()


def test_every_site_has_its_search_space_in_order() -> None:
    prepared = prepare(Residual(64).eval(), (X,), [Rule(name="r", structures=("channel",))])
    assert [space.site for space in prepared.search_spaces] == list(prepared.sites)
    assert str(prepared.search_spaces[0].reason).startswith("it is the stem, the first convolution the network runs")
    assert any(space.rank_ranges for space in prepared.search_spaces)
    rules = prepared.rules
    assert prepare(Residual(64).eval(), (X,), rules, left=0.1).search_spaces[0].rank_ranges


def test_the_original_is_kept_beside_its_copy() -> None:
    original, model = Residual().eval(), Residual().eval()
    assert prepare(model, (X,), [], original=original).original is original
    assert prepare(model, (X,), []).original is model


def test_the_callers_structures_are_known_beside_the_discovered_ones() -> None:
    prepared = prepare(Residual(64).eval(), (X,), [Rule(name="r", structures=("mine",))], [Renamed()])
    assert {"separable", "mine"} <= prepared.structures.keys()
    names = {rank_range.structure.name for space in prepared.search_spaces for rank_range in space.rank_ranges}
    assert names == {"mine"}
    with pytest.raises(RuleFileError, match="mine"):
        prepare(Residual(64).eval(), (X,), [Rule(name="r", structures=("mine",))])


def test_a_model_without_a_convolution_is_refused() -> None:
    with pytest.raises(TraceError, match="the model has no convolution"):
        prepare(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).eval(), (X,), [])
