"""Putting modules in the places of functional convolutions, as a plan says."""

import io
from dataclasses import replace

import pytest
import torch
from networks import settled, state_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.conv import ConvSpec
from convrewrite.errors import PlanError
from convrewrite.graph.lifting import lift
from convrewrite.graph.lifts import Lift, LiftedConv, apply_lifts

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Filter(nn.Module):
    """A functional convolution with kernels in a dictionary, of which one more is used in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterDict({"a": torch.randn(4, 3, 3, 3), "b": torch.randn(4, 4, 1, 1)})

    def forward(self, x: Tensor, power: int = 1) -> Tensor:
        return F.conv2d(F.conv2d(x, self.kernels["a"], padding=1), self.kernels["b"].square()) ** power


SPEC = ConvSpec(3, 4, (3, 3), padding=(1, 1), bias=False)
PLANNED = Lift("1", ("x",), (LiftedConv("kernels.a", None, "kernels_a", SPEC),))


def network() -> nn.Sequential:
    return settled(nn.Sequential(nn.Conv2d(3, 3, 1), Filter(), nn.ReLU()))


@torch.no_grad()
def test_another_instance_is_lifted_in_the_same_way() -> None:
    first, second = network(), network()
    found = lift(first, (X,))
    assert found.lifts == (PLANNED,)
    before = state_bytes(second)
    made = apply_lifts(second, found.lifts)
    assert torch.allclose(made(X), second(X), atol=1e-6)
    assert list(made.state_dict()) == list(found.model.state_dict())
    assert "1.kernels.b" in made.state_dict()
    assert state_bytes(second) == before
    assert not any(module.training for module in made.modules())


def test_a_lifted_model_can_be_shown_and_pickled_with_its_weights() -> None:
    made = apply_lifts(network(), [PLANNED])
    assert "(kernels_a): Conv2d(3, 4" in repr(made)
    file = io.BytesIO()
    torch.save(made, file)
    assert b"convrewrite" not in file.getvalue(), "a graph module needs torch alone"
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), made(X))


def test_gradients_reach_what_was_lifted() -> None:
    made = apply_lifts(network(), [PLANNED])
    made(X).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        replace(PLANNED, module="2"),
        replace(PLANNED, module="9"),
        replace(PLANNED, convs=(LiftedConv("kernels.b", None, "b", ConvSpec(4, 4, (1, 1), bias=False)),)),
        replace(PLANNED, convs=(LiftedConv("kernels.a", None, "a", replace(SPEC, kernel_size=(5, 5))),)),
        replace(PLANNED, convs=(LiftedConv("kernels.a", "kernels.c", "a", replace(SPEC, bias=True)),)),
    ],
)
def test_a_plan_of_another_model_is_refused(wrong: Lift) -> None:
    with pytest.raises(PlanError, match=r"expected a forward that calls kernels\.. as a convolution, found none"):
        apply_lifts(network(), [wrong])
