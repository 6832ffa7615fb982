"""Features of examples that an earlier layer picks, which are others in the rewritten model."""

import torch
from torch import Tensor, nn

from convrewrite.meanings.kinds import Meaning
from convrewrite.tuning.blocks import joins, observed
from convrewrite.tuning.losses import Distillation

MEANINGS = {"output": Meaning("values", "it was said")}
OUTPUTS = {"output": torch.ones(4, 3)}


class Picking(nn.Module):
    """A layer of the examples beyond ``least``, and one of all."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.some, self.every, self.least = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), least

    def forward(self, x: Tensor) -> Tensor:
        picked = torch.nonzero(x.mean((1, 2, 3)) > self.least)[:, 0]
        return torch.zeros_like(x).index_copy(0, picked, self.some(x[picked])) + self.every(x)


def test_what_gets_some_of_the_examples_is_not_compared() -> None:
    x = torch.arange(5.0)[:, None, None, None].expand(5, 2, 3, 3)
    sites: dict[str, str | None] = {"some": None, "every": None}
    assert joins(Picking(2.5), Picking(2.5), sites, (x,)) == ("every",)
    assert joins(Picking(-1), Picking(-1), sites, (x,)) == ("some", "every")


def test_features_of_other_shapes_have_no_part_in_a_batch() -> None:
    features = {"some": torch.ones(2, 3), "every": torch.ones(4, 3)}
    loss = Distillation.of(OUTPUTS, MEANINGS, features, weight=1.0)
    found = {"some": torch.zeros(3, 3), "every": torch.zeros(4, 3)}
    every = Distillation.of(OUTPUTS, MEANINGS, {"every": features["every"]}, weight=1.0)
    wanted = {"some": torch.ones(2, 3), "every": torch.ones(4, 3)}
    assert float(loss(OUTPUTS, OUTPUTS, wanted, found)) == float(every(OUTPUTS, OUTPUTS, wanted, found)) == 1.0
    assert float(loss(OUTPUTS, OUTPUTS, {}, found)) == 0.0


def test_what_was_not_called_in_a_run_is_not_seen_of_the_run_before() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if len(x) > 1 else self.a(x)

    model = Sometimes()
    with observed(model, ["a", "b", "none"]) as seen:
        for count, names in ((2, {"a", "b"}), (1, {"a"})):
            model(torch.zeros(count, 2))
            assert seen.keys() == names and len(seen["a"]) == count
