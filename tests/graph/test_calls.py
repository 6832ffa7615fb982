"""What a run shows: calls of modules and functions, and who uses which tensor."""

import copy

import pytest
import torch
from networks import Calls
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.conv import Cost
from convrewrite.errors import TraceError
from convrewrite.graph.calls import observe

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Filter(nn.Module):
    """A functional convolution on its own parameter, optionally scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.conv2d(x, self.kernel, padding=self.kernel.shape[-1] // 2) * scale


def test_a_functional_call_in_a_module_called_twice_is_one_convolution_with_two_calls() -> None:
    model = Calls(lambda m, x: m.filter(F.max_pool2d(m.filter(x), 2)), filter=Filter())
    seen = observe(model, (X,))
    assert list(seen.calls) == ["filter#0"]
    call = seen.calls["filter#0"]
    assert (call.owner, call.module) == ("filter", None)
    assert call.sizes == [(8, 8), (4, 4)]
    assert all(weight is model.filter.kernel for weight in call.weights)
    assert seen.runs[id(model.filter)] == 2


def test_a_shallow_copy_of_a_module_shares_its_hooks_and_counts_its_own_calls_alone() -> None:
    conv = nn.Conv2d(3, 3, 3)
    seen = observe(Calls(lambda m, x: m.other(m.conv(m.conv(x))), conv=conv, other=copy.copy(conv)), (X,))
    assert {name: call.sizes for name, call in seen.calls.items()} == {"conv": [(8, 8), (6, 6)], "other": [(4, 4)]}


def test_functional_calls_in_one_forward_are_counted() -> None:
    model = Calls(lambda m, x: F.conv2d(F.conv2d(x, m.filter.kernel), m.filter.kernel), filter=Filter())
    assert list(observe(model, (X,)).calls) == ["#0", "#1"]


def test_calls_of_another_geometry_at_the_same_place_are_other_convolutions() -> None:
    class Growing(Filter):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return F.conv2d(x, self.kernel, padding=int(scale))

    model = Calls(lambda m, x: m.filter(m.filter(m.filter(x), 2.0)), filter=Growing())
    calls = observe(model, (X,)).calls
    assert {name: len(call.sizes) for name, call in calls.items()} == {"filter#0": 2, "filter#1": 1}


def test_the_arguments_a_forward_is_given_are_noted_by_name() -> None:
    model = Calls(lambda m, x: m.filter(m.filter(x), scale=2.0), filter=Filter())
    assert observe(model, (X,)).calls["filter#0"].given == [("x",), ("x", "scale")]


def test_users_are_those_that_do_more_than_convolve_with_a_tensor_or_ask_for_its_shape() -> None:
    model = Calls(lambda m, x: m.filter(x) * m.filter.kernel.sum(), filter=Filter())
    assert observe(model, (X,)).users == {id(model.filter.kernel): {""}}
    alone = Calls(lambda m, x: m.filter(x), filter=Filter())
    assert observe(alone, (X,)).users == {}


def test_a_plain_convolution_is_a_user_of_its_weight_and_one_call() -> None:
    model = Calls(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    seen = observe(model, (X,))
    assert list(seen.calls) == ["conv"]
    assert seen.users[id(model.conv.weight)] == {"conv"}


def test_a_subclass_of_a_convolution_is_a_module_whose_forward_calls_a_function() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert list(observe(nn.Sequential(Scaled(3, 4, 3)), (X,)).calls) == ["0", "0#0"]


def test_sizes_are_those_of_the_convolutions_own_dimensions() -> None:
    """Of one example: a row for one dimension, and for three a plane that costs as much."""
    weight = torch.randn(2, 3, 3, 3, 3)

    def forward(model: Calls, x: Tensor) -> Tensor:
        y = torch.convolution(x[:, :, None], weight, None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)
        return model.row(x.flatten(2)).mean() + y.mean()

    calls = observe(Calls(forward, row=nn.Conv1d(3, 4, 5)), (X,)).calls
    assert calls["row"].sizes == [(1, 64)]
    assert calls["#0"].spec.describe() == "3->2 3x3x3 p1"
    assert calls["#0"].spec.cost(calls["#0"].sizes) == Cost(2 * 3 * 27, 8 * 8 * 2 * 3 * 27)


def test_nothing_stays_behind_when_the_model_fails() -> None:
    def refuse(model: Calls, x: Tensor) -> Tensor:
        model.filter(x)
        raise RuntimeError("no")

    model = Calls(refuse, filter=Filter())
    with pytest.raises(TraceError, match="does not run"):
        observe(model, (X,))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
