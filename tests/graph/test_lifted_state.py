"""What following a forward must not do: change a tensor, hold a random number still, or take one size for all."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import natural
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite import optimize
from convrewrite.graph.lifting import Lifted, lift
from convrewrite.rules.schema import Protect, Rule

X = natural(4, 3, 8, 8, torch.float32)
RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.8)


class Net(nn.Module):
    """A functional convolution; ``does`` is done with what it gives."""

    def __init__(self, does: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("share", torch.full((1,), 0.5))
        self.beside = torch.ones(8)  # no buffer
        self.seen: list[Tensor] = []
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, F.conv2d(x, self.kernel, padding=1))


def running(net: Net, y: Tensor) -> Tensor:
    net.mean.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
    return y


def running_beside(net: Net, y: Tensor) -> Tensor:
    net.beside.mul_(0.9)
    return y


def scaled(net: Net, y: Tensor) -> Tensor:
    return y * (net.share + 1.0)


def listed(net: Net, y: Tensor) -> Tensor:
    net.seen.append(y)
    return y


def drawn(_net: Net, y: Tensor) -> Tensor:
    return y * (torch.rand(()) < 2.0)


def drawn_by_python(_net: Net, y: Tensor) -> Tensor:
    return y * (random.random() < 2.0)


def drawn_by_numpy(_net: Net, y: Tensor) -> Tensor:
    return y * float(np.random.rand() < 2.0)


def of_this_size(_net: Net, y: Tensor) -> Tensor:
    try:
        return y.view(y.shape[0], 8, 64).mean(2)
    except RuntimeError:
        return y.sum((2, 3))


def of_this_width(_net: Net, y: Tensor) -> Tensor:
    return y + torch.arange(8.0) if y.shape[-1] is not None else y


def net(does: Callable[[Net, Tensor], Tensor]) -> Net:
    return Net(does).eval()


def lifted(model: Net) -> Lifted:
    return lift(model, (X,))


def test_a_buffer_that_a_forward_updates_is_updated_by_its_graph_and_by_nothing_else() -> None:
    model = net(running)
    result = optimize(model, X[:1], [RULE], X, measure=False, fast=True)
    assert [row.name for row in result.report.sites if row.action == "rewritten"] == ["kernel"]
    assert torch.equal(model.mean, torch.ones(8))
    assert torch.equal(result.model.get_buffer("mean"), torch.ones(8))
    expected, found = net(running), lifted(model).model
    found.get_buffer("mean").fill_(1.0)  # it has run
    with torch.no_grad():
        for _ in range(2):
            expected(X), found(X)
    torch.testing.assert_close(found.get_buffer("mean"), expected.mean)


def test_a_number_made_of_a_buffer_follows_the_buffer() -> None:
    model = net(scaled)
    found = lifted(model)
    assert len(found.lifts) == 1
    for one in (model, found.model):
        one.get_buffer("share").fill_(3.0)
    torch.testing.assert_close(found.model(X), model(X))


@pytest.mark.parametrize("does", [running_beside, drawn, drawn_by_python, drawn_by_numpy])
def test_what_a_graph_would_leave_out_or_hold_still_is_not_lifted(does: Callable[[Net, Tensor], Tensor]) -> None:
    found = lifted(net(does))
    assert not found.lifts
    assert "cannot be followed as a graph" in found.reasons["kernel"]


@pytest.mark.parametrize("does", [of_this_size, of_this_width])
def test_a_forward_that_a_graph_follows_at_one_size_alone_is_not_lifted(does: Callable[[Net, Tensor], Tensor]) -> None:
    found = lifted(net(does))
    assert bool(found.lifts) == (does is of_this_width)  # which takes no other width itself


def test_what_a_forward_puts_in_a_list_is_left_out_and_said() -> None:
    found = lifted(net(listed))
    assert any("what it writes to its attributes, is left out" in note for note in found.notes)
    assert not any("left out" in note for note in lifted(net(scaled)).notes)
