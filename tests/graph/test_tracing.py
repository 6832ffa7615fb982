"""Graphs of whole models, and of the parts of those that cannot be followed whole."""

import functools
import math
import operator
import pickle
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from networks import Branching, CalledTwice, Calls, Chain, NineKinds, Residual, settled
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.errors import TraceError
from convrewrite.graph.checked import follow
from convrewrite.graph.tracing import follow_forward, module_calls, qualified, trace
from convrewrite.layers.branches import SumOfBranches
from convrewrite.modules.running import run

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Optional(nn.Module):
    """An argument that is only used when it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        return x * scale


@pytest.mark.parametrize(
    "model", [Chain(), Residual(), CalledTwice(), NineKinds(), Optional()], ids=lambda m: type(m).__name__
)
@torch.no_grad()
def test_a_whole_graph_computes_what_the_model_computes(model: nn.Module) -> None:
    settled(model)
    traced = trace(model)
    assert traced.whole is not None
    assert (traced.lost, list(traced.parts)) == ((), [""])
    assert torch.equal(traced.whole(X.clone()), model(X.clone()))


def test_defaults_are_taken_as_a_call_with_the_input_alone_takes_them() -> None:
    model = Optional().eval()
    whole = trace(model).whole
    assert whole is not None
    assert [node.name for node in whole.graph.nodes if node.op == "placeholder"] == ["x"]
    assert operator.mul in [node.target for node in whole.graph.nodes]


@torch.no_grad()
def test_a_model_that_cannot_be_followed_is_followed_in_parts() -> None:
    model = settled(Branching())
    traced = trace(model)
    assert traced.whole is None
    assert traced.lost == ("",)
    assert set(traced.parts) == {"stem", "block"}
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(traced.parts["block"](x.clone()), model.block(x.clone()))
    names = [name for name, _ in module_calls(traced.parts)]
    assert names == [
        "stem.0",
        "stem.1",
        "stem.2",
        *[f"block.{n}" for n in ("conv1", "bn1", "relu", "conv2", "bn2", "relu")],
    ]


@torch.no_grad()
def test_a_list_of_modules_is_not_said_to_be_impossible_to_follow() -> None:
    blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))])
    traced = trace(settled(Calls(lambda m, x: m.blocks[0](x) if x.sum() > 0 else x, blocks=blocks)))
    assert (traced.lost, list(traced.parts)) == (("",), ["blocks.0"])


@torch.no_grad()
def test_an_innermost_part_that_fails_is_left_opaque_in_the_graph_around_it() -> None:
    inner = Branching()
    inner.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    model = settled(
        Calls(lambda m, x: m.after(m.inner(m.before(x))), before=nn.Conv2d(3, 4, 1), inner=inner, after=nn.ReLU())
    )
    traced = trace(model)
    assert traced.whole is None, "the convolutions of the opaque part are no nodes"
    assert traced.lost == ("inner",)
    assert set(traced.parts) == {"", "inner.stem", "inner.block"}
    assert torch.equal(traced.parts[""](X), model(X))
    assert "inner.block.conv1" in [name for name, _ in module_calls(traced.parts)]


def test_the_forward_of_a_sum_of_branches_is_one_node() -> None:
    whole = trace(nn.Sequential(SumOfBranches([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)]), nn.ReLU())).whole
    assert whole is not None
    assert [str(n.target) for n in whole.graph.nodes if n.op == "call_module"] == ["0", "1"]


def test_an_opaque_part_without_convolutions_loses_nothing() -> None:
    """It is one node; the modules in it may be followed by nobody."""
    opaque = Calls(lambda m, x: m.relu(x) if float(x.detach().mean()) > -1e9 else x, relu=nn.ReLU())
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), opaque, nn.Conv2d(4, 4, 3)))
    traced = trace(model)
    assert traced.lost == ()
    assert traced.whole is not None
    assert [str(n.target) for n in traced.whole.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(traced.whole(X), model(X))


def test_what_submodules_keep_while_they_are_followed_is_taken_away() -> None:
    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Keeps())
    assert trace(model).whole is not None
    assert "seen" not in vars(model[1])


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = settled(Branching())
    before = model(X)
    trace(model)
    assert torch.equal(model(X), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_qualified_names() -> None:
    assert [qualified("", "a.b"), qualified("p", "a.b"), qualified("p", "")] == ["a.b", "p.a.b", "p"]


def test_a_model_that_does_not_run_says_on_which_input() -> None:
    with pytest.raises(TraceError, match=r"Chain: the model does not run on input 1x4x8x8: .*--input"):
        run(Chain(), (torch.zeros(1, 4, 8, 8),))


def test_an_error_without_a_message_is_named() -> None:
    def refuse(_model: Calls, _x: Tensor) -> Tensor:
        raise KeyError

    with pytest.raises(TraceError, match="KeyError"):
        run(Calls(refuse), (X,))


def test_running_takes_no_gradients() -> None:
    output = run(Calls(lambda m, x: F.relu(m.conv(x)), conv=nn.Conv2d(3, 4, 3)), (X,))
    assert not output.requires_grad


def test_running_leaves_the_inputs_as_they_were() -> None:
    x = X.clone()
    run(Calls(lambda m, x: x.mul_(2)), (x,))
    assert torch.equal(x, X)


@torch.no_grad()
def test_the_greatest_and_the_least_of_sizes_are_nodes_and_python_has_its_own_again() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        height, width = x.size()[-2:]
        pad = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0, width - 9)
        return model.conv(F.pad(x, (0, min(pad, 5)))) * max(1, 2)

    model = Calls(forward, conv=nn.Conv2d(3, 4, 3, stride=2)).eval()
    own = (max, min)
    whole = trace(model).whole
    assert (max, min) == own
    assert whole is not None
    again = pickle.loads(pickle.dumps(follow_forward(model, ["x"])))
    for size in ((12, 12), (13, 17), (9, 8)):
        x = torch.randn(2, 3, *size)
        assert torch.equal(whole(x), model(x))
        assert torch.equal(again(x), model(x))


@torch.no_grad()
def test_the_length_of_a_tensor_is_a_node() -> None:
    model = Calls(lambda m, x: m.conv(x) + torch.arange(len(x)).view(len(x), 1, 1, 1), conv=nn.Conv2d(3, 4, 3)).eval()
    graph = pickle.loads(pickle.dumps(follow_forward(model, ["x"])))
    for x in torch.randn(5, 3, 8, 8).split([2, 3]):
        assert torch.equal(graph(x), model(x))


def test_python_has_its_own_again_where_following_fails() -> None:
    own = (max, min)
    model = Calls(lambda m, x: m.conv(x) if max(x.size()) > 3 else min([x.mean()]), conv=nn.Conv2d(3, 4, 3))
    assert trace(model).whole is None
    assert (max, min) == own


def test_tensors_made_on_the_way_are_not_left_on_the_model() -> None:
    model = Calls(lambda m, x: m.conv(x) * torch.ones(4, 1, 1), conv=nn.Conv2d(3, 4, 3))
    before = set(vars(model))
    whole = trace(model).whole
    assert whole is not None and torch.equal(whole(X), model(X))
    assert set(vars(model)) == before


@torch.no_grad()
def test_what_is_made_of_sizes_and_written_in_part_is_in_the_graph() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        y = torch.zeros(x.size(0), 4, x.shape[2] - 2, x.shape[3] - 2)
        y[:, 1:] += model.conv(x)[:, 1:]
        y[y > 1] = 0
        h = model.start
        for part in y.unbind(2)[:2]:
            h = model.cell(part.mean(2), h.expand(x.shape[0], 4))
        return (h[..., None, None] + y) / torch.tensor([x.shape[2], 2.0])[0]

    model = Calls(forward, conv=nn.Conv2d(3, 4, 3), cell=nn.GRUCell(4, 4)).eval()
    model.register_buffer("start", torch.randn(1, 4))
    made = (torch.zeros, torch.tensor, Tensor.expand)
    whole = follow(model, (X,)).whole
    assert whole is not None and (torch.zeros, torch.tensor, Tensor.expand) == made
    for x in (X, torch.randn(5, 3, 12, 12)):
        assert torch.equal(whole(x), model(x))


def test_an_input_that_is_not_used_stays_an_input() -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
            return y * scale

    whole = trace(Second(), 2).whole
    assert whole is not None and torch.equal(whole(X, X + 1), (X + 1) * 2)


def test_the_graph_of_a_forward_alone_has_its_submodules_as_nodes() -> None:
    model = settled(Residual())
    graph_module = follow_forward(model, ["x"])
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    assert calls == ["stem", "bn", "relu", "blocks", "head"]
    assert torch.equal(graph_module(X), model(X))


def test_arguments_that_are_not_given_take_their_defaults() -> None:
    model = Optional().eval()
    assert torch.equal(follow_forward(model, ["x"])(X), model(X))
    given = follow_forward(model, ["x", "scale"])
    assert torch.equal(given(X, 3.0), model(X, scale=3.0))


class Pooled(nn.Module):
    """Has a tuple among its defaults, as blocks of audio networks do, and one argument behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, pool_size: tuple[int, int] = (2, 2), scale: float = 2.0) -> Tensor:
        return F.avg_pool2d(self.conv(x), pool_size) * scale


@torch.no_grad()
def test_a_tuple_among_the_defaults_is_taken_as_it_is() -> None:
    model = Pooled().eval()
    for traced in (follow(model, (X,)).whole, follow_forward(model, ["x"])):
        assert traced is not None and torch.equal(traced(X), model(X))
    given = follow_forward(model, ["x", "scale"])
    assert torch.equal(given(X, 3.0), model(X, scale=3.0))


def test_shapes_of_parameters_are_constants_of_a_forward() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel, padding=self.kernel.shape[-1] // 2)

    (call,) = [n for n in follow_forward(Padded(), ["x"]).graph.nodes if n.op == "call_function"]
    assert call.kwargs == {"padding": 2}


class Centred(nn.Module):
    """Keeps its mean on the device and in the type of its input, as networks for super-resolution do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.mean = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        return self.conv(x - self.mean) + self.mean * torch.tensor(np.float64(2.0))


@torch.no_grad()
def test_an_attribute_that_a_forward_replaces_is_what_it_was() -> None:
    model = Centred().eval()
    mean, x = model.mean, torch.randn(2, 3, 6, 6)
    whole = trace(model).whole
    for graph in (whole, follow_forward(model, ["x"])):
        assert graph is not None and torch.equal(graph(x), model(x))
    model.mean = mean
    assert trace(model).whole is not None
    assert model.mean is mean
    assert not any(name.startswith("_tensor_constant") for name in vars(model))


def with_return_dict(forward: Any) -> Any:
    """Takes an argument of its own, as decorators of transformers do."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        return {"logits": found} if kwargs.pop("return_dict", True) else found

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    @with_return_dict
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, **kwargs: Any) -> Tensor:
        x = self.norm(self.conv(x)) * scale
        return x if mask is None or "output_attentions" in kwargs else x * mask


def test_a_forward_is_followed_through_its_decorator() -> None:
    model = settled(Decorated())
    x, mask = torch.randn(2, 3, 6, 6), torch.randn(2, 8, 4, 4)
    for inputs in ((x,), (x, mask)):
        whole = trace(model, len(inputs)).whole
        with torch.no_grad():
            assert whole is not None and torch.equal(whole(*inputs)["logits"], model(*inputs)["logits"])


@torch.no_grad()
def test_a_forward_that_replaces_that_of_the_class_is_followed() -> None:
    model = settled(Residual())
    plain = model.forward
    model.forward = lambda x, scale=2.0: plain(x * scale) + 1  # type: ignore[method-assign]
    for traced in (follow(model, (X,)).whole, follow_forward(model, ["x"])):
        assert traced is not None and torch.equal(traced(X), model(X))


def test_what_a_decorated_forward_is_given_by_keyword_is_given_on() -> None:
    model = settled(Decorated())
    followed = follow_forward(model, ["x", "scale"])
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(followed(x, scale=3.0)["logits"], model(x, scale=3.0)["logits"])


def rearrange(tensor: Tensor, pattern: str) -> Tensor:
    """Refuses what is no tensor, as einops does."""
    if not isinstance(tensor, Tensor):
        raise RuntimeError(f"Tensor type unknown to einops {type(tensor)}")
    return tensor.flatten(2) if pattern == "b c h w -> b c (h w)" else tensor.transpose(1, 2)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(rearrange(self.norm(self.conv(x)), "b c h w -> b c (h w)"), "b c n -> b n c")


def test_functions_of_einops_are_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Tokens(), nn.Linear(8, 4)).eval()
    assert trace(model).lost == ("0",), "otherwise this shows nothing"
    monkeypatch.setitem(sys.modules, "einops", types.SimpleNamespace(rearrange=rearrange))
    whole = trace(model).whole
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        assert whole is not None and torch.equal(whole(x), model(x))
    assert rearrange(x, "").shape == (2, 6, 3, 6), "it is itself again"
