"""What activation functions give, in the order of their calls."""

import torch
from torch import Tensor, nn

from convrewrite.tuning.activations import Activations, comparable


class Mixed(nn.Module):
    """Calls activations in all the ways there are."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.hard, self.silu = nn.ReLU(), nn.ReLU6(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(x) + torch.relu(-x) + nn.functional.gelu(x) + (x + 1).relu_()
        return self.silu(self.hard(y) + 0) + self.relu(y) + torch.sigmoid(y)


def test_every_call_is_noted_once() -> None:
    x = torch.randn(2, 3)
    with Activations() as noted:
        Mixed()(x)
    assert list(noted.seen) == [f"activation {index}" for index in range(7)]
    assert torch.equal(noted.seen["activation 0"], x.relu())
    assert torch.equal(noted.seen["activation 1"], (-x).relu())
    assert torch.equal(noted.seen["activation 3"], (x + 1).relu())


def test_features_hold_their_gradients() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with Activations() as noted:
        Mixed()(x)
    assert all(value.requires_grad for value in noted.seen.values())


def test_two_models_are_comparable_that_call_as_many_on_the_same_shapes() -> None:
    one, two = {"activation 0": torch.zeros(2, 3)}, {"activation 0": torch.ones(2, 3)}
    assert comparable(one, two)
    assert not comparable(one, {**two, "activation 1": torch.ones(2, 3)})
    assert not comparable(one, {"activation 0": torch.ones(2, 4)})
