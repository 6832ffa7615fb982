"""What everything in one run is measured on, and what its outputs were taken for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convrewrite.errors import ModelError
from convrewrite.meanings.evaluation import Evaluation
from convrewrite.meanings.kinds import Meaning

MODEL = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(16, 3), nn.Softmax(1)).eval()
BATCHES = ((torch.rand(8, 1, 2, 2),), (torch.rand(8, 1, 2, 2),))


def test_meanings_are_told_from_the_model_once_and_the_rest_stays() -> None:
    before = Evaluation(BATCHES, "8 inputs")
    told = before.with_meanings(MODEL, {})
    assert (told.batches, told.basis, told.noise) == (before.batches, before.basis, before.noise)
    assert {name: meaning.kind for name, meaning in told.meanings.items()} == {"output": "probabilities"}
    assert before.meanings == {}


def test_what_the_caller_says_counts_before_what_is_known_and_that_before_what_is_told() -> None:
    said, known = Meaning("embedding", "asked for"), Meaning("values", "as the plan has it")
    evaluation = Evaluation(BATCHES, "8 inputs")
    assert evaluation.with_meanings(MODEL, {}, {"output": known}).meanings["output"].kind == "values"
    assert evaluation.with_meanings(MODEL, {"output": said}, {"output": known}).meanings["output"].kind == "embedding"


def test_on_noise_looks_are_not_believed() -> None:
    """Maps in which one channel is far on top at every position, as those of a segmentation."""
    model = nn.Identity()
    maps = 20 * F.one_hot(torch.randint(3, (64, 8, 8)), 3).permute(0, 3, 1, 2) + torch.randn(64, 3, 8, 8)
    real = Evaluation(((maps,),), "inputs").with_meanings(model, {})
    noise = Evaluation(((maps,),), "noise", noise=True).with_meanings(model, {})
    assert (real.meanings["output"].kind, noise.meanings["output"].kind) == ("logits", "values")


def test_what_gives_nan_for_some_inputs_cannot_be_compared() -> None:
    maps = torch.rand(20, 3)
    maps[17, 0] = torch.nan
    evaluation = Evaluation(((maps,),), "inputs")
    with pytest.raises(ModelError, match="'output': expected numbers for every input, found NaN among them"):
        evaluation.with_meanings(nn.Identity(), {}, comparable=True)
    ignored = {"output.a": Meaning("ignore", "as asked")}
    both = Evaluation(((maps, torch.rand(20, 3)),), "inputs")
    told = both.with_meanings(Pair(), ignored, comparable=True).meanings
    assert not told["output.a"].counts and told["output.b"].counts
    assert evaluation.with_meanings(nn.Identity(), {}).meanings.keys() == {"output"}
    Evaluation(((maps,),), "noise", noise=True).with_meanings(nn.Identity(), {}, comparable=True)


class Pair(nn.Module):
    """Its inputs by name."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both."""
        return {"a": a.clone(), "b": b.clone()}
