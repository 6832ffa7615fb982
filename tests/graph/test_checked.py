"""A graph that computes something else than its module is dropped, with nothing else lost."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from networks import Calls, Chain, Residual, settled
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from convrewrite import optimize
from convrewrite.errors import TraceError
from convrewrite.graph import checked
from convrewrite.graph.checked import follow
from convrewrite.graph.sites import find_sites
from convrewrite.graph.stateful import writes_unforeseen
from convrewrite.graph.tracing import trace

X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Joined(nn.Module):
    """Concatenates the skip only where its type is torch's, which nothing's is while a graph is followed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if type(skip) is Tensor:
            x = torch.cat([x, skip], 1)
        return self.conv(x)


class Added(nn.Module):
    """The same trap without a change of shape, so that nothing fails."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if type(x) is Tensor else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.join = Joined(16, 8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(self.join(x, x * 0.5))


@pytest.mark.parametrize("model", [Chain(), Residual()], ids=["chain", "residual"])
def test_a_right_graph_is_kept(model: nn.Module) -> None:
    traced = follow(settled(model), (X,))
    assert traced.whole is not None
    assert traced.lost == ()


def test_a_wrong_graph_is_dropped_and_what_is_inside_followed_part_by_part() -> None:
    model = settled(Net())
    assert trace(model).whole is not None
    traced = follow(model, (X,))
    assert traced.whole is None
    assert traced.lost == ("", "join")
    assert set(traced.parts) == {"stem", "join.conv"}
    sites = {site.name: site for site in find_sites(model, (X,), traced)}
    assert sites["join.conv.0"].batch_norm == "join.conv.1"
    assert sites["stem.0"].batch_norm == "stem.1"


def test_a_graph_that_runs_but_gives_other_numbers_is_dropped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Added(), nn.Conv2d(4, 4, 3)).eval()
    assert trace(model).whole is not None
    assert follow(model, (X,)).lost == ("",)


class Called(Chain):
    """Normalises in front of its forward, and doubles what that gives."""

    def __init__(self, before: float, after: float) -> None:
        super().__init__()
        self.before, self.after = before, after

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x * self.before) * self.after  # type: ignore[no-any-return]


def test_a_graph_without_what_is_done_around_the_forward_of_the_model_is_dropped() -> None:
    hooked = [settled(Chain()) for _ in range(3)]
    hooked[0].register_forward_pre_hook(lambda _module, args: (args[0] * 0.1,))
    hooked[1].register_forward_pre_hook(lambda _module, args, kwargs: ((args[0] * 0.1,), kwargs), with_kwargs=True)
    hooked[2].register_forward_hook(lambda _module, _args, output: output * 2)
    models = [*hooked, settled(Called(0.1, 1)), settled(Called(1, 2))]
    assert [follow(model, (X,)).whole for model in models] == [None] * 5
    assert follow(settled(Called(1, 1)), (X,)).whole is not None


def test_random_numbers_of_a_forward_are_the_same_for_both() -> None:
    model = Calls(lambda m, x: m.conv(x + torch.randn_like(x)), conv=nn.Conv2d(3, 4, 3)).eval()
    state = torch.get_rng_state()
    traced = follow(model, (X,))
    assert torch.equal(torch.get_rng_state(), state)
    expected = [n.target for n in fx.symbolic_trace(model).graph.nodes]
    assert traced.whole is not None
    assert [n.target for n in traced.whole.graph.nodes] == expected


def test_work_in_place_does_not_disturb() -> None:
    model = Calls(lambda m, x: m.conv(F.relu(x, inplace=True)).add_(1), conv=nn.Conv2d(3, 4, 3)).eval()
    before = X.clone()
    assert follow(model, (X,)).whole is not None
    assert torch.equal(X, before)


def test_a_model_that_does_not_run_is_a_trace_error() -> None:
    with pytest.raises(TraceError, match="1x3x12x12"):
        follow(nn.Conv2d(7, 4, 3), (X,))


def test_such_a_model_is_rewritten_by_its_true_inputs() -> None:
    model = settled(Net())
    images = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    report = optimize(model, X, calibration=images, measure=False).report
    rows = {row.name: row for row in report.sites}
    assert [rows[name].action for name in ("join.conv.0", "last")] == ["rewritten", "rewritten"]
    assert any("the model itself, join could not be followed as a graph" in note for note in report.notes)


def test_a_graph_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if type(x) is Tensor else x * x.shape[7]

    traced = follow(nn.Sequential(nn.Conv2d(3, 4, 3), Deep()).eval(), (torch.randn(2, 3, 6, 6),))
    assert traced.whole is None
    assert capfd.readouterr() == ("", "")


def test_parts_are_compared_in_one_run_however_many_they_are() -> None:
    def runs(parts: int) -> int:
        counted: list[int] = []

        def forward(module: nn.Module, x: Tensor) -> Tensor:
            if type(x) is Tensor:  # so it is followed part by part
                counted.append(1)
            for block in module.children():
                x = x + block(x) if float(x.sum()) else x
            return x

        def block() -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

        model = settled(Calls(forward, **{f"block{index}": block() for index in range(parts)}))
        counted.clear()
        traced = follow(model, (X,))
        assert traced.parts.keys() == {f"block{index}" for index in range(parts)}
        return len(counted)

    assert runs(8) == runs(1)


class Up(nn.Module):
    """As in the decoder of a U-Net, with a skip that may be missing, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, skip: Tensor | None = None, normed: bool = True) -> Tensor:
        x = self.conv(x if skip is None else x + skip)
        return self.norm(x) if normed else x


def test_a_part_is_followed_with_all_that_it_is_given_but_no_constant_is_taken_for_the_one_of_every_call() -> None:
    def forward(m: Calls, x: Tensor) -> Tensor:
        x = m.plain(m.second(m.first(x, x), skip=x), None) if x.sum() < 1e9 else x  # so it is followed part by part
        return m.without(m.switched(x, x, normed=bool(x.sum() < 1e9))) + m.without(x, x)

    names = ("first", "second", "plain", "switched", "without")
    model = settled(Calls(forward, **{name: Up() for name in names}))
    traced = follow(model, (X,))
    assert set(traced.parts) == {"first", "second", "plain", "without"}
    assert "switched" in traced.lost
    folded = {site.name: site.batch_norm for site in find_sites(model, (X,), traced) if site.batch_norm}
    assert folded == {f"{name}.conv": f"{name}.norm" for name in ("first", "second", "plain")}


def depthwise(m: Calls, x: Tensor) -> Tensor:
    """An inverted residual, its branch scaled by a parameter: the sum is made in place in what comes of the parameter."""
    x = m.act(m.stem(x))
    y = m.scale * m.project(m.act(m.spatial(x)))
    y += x
    return m.act(y)


def dense(m: Calls, x: Tensor) -> Tensor:
    x = F.relu_(m.stem(x))
    return m.project(F.avg_pool2d(torch.cat([x, F.dropout(m.spatial(x), training=m.training)], 1)[:, :8], 2))


def layers() -> dict[str, nn.Module]:
    shapes = {"stem": nn.Conv2d(3, 8, 3, 2, 1), "spatial": nn.Conv2d(8, 8, 3, 1, 1, groups=8)}
    return shapes | {"project": nn.Conv2d(8, 8, 1), "act": nn.ReLU6(inplace=True)}


def scaled() -> Calls:
    model = Calls(depthwise, **layers())
    model.scale = nn.Parameter(torch.ones(8, 1, 1))
    return model


class Outputs(NamedTuple):
    y: Tensor


ORDINARY = {
    "named output": lambda: Calls(lambda m, x: Outputs(y=m.stem(x)), **layers()),
    "resnet": Residual,
    "mobilenet": scaled,
    "densenet": lambda: Calls(dense, **layers()),
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)),
    "operators": lambda: Calls(
        lambda m, x: m.last(torch.ops.aten.relu_(m.first(x))), first=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 3)
    ),
}


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_networks_hand_nothing_on_beside_their_graph(make: Callable[[], nn.Module]) -> None:
    traced = follow(settled(make()), (X,))
    assert traced.whole is not None
    assert not traced.draws
    assert not traced.stateful


def test_another_thread_that_draws_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the threads of a scheduler's worker do, to know how long they wait."""
    others = [random.random]

    def watched(*given: Any) -> bool:
        if others:
            others.pop()()
        return writes_unforeseen(*given)

    monkeypatch.setattr(checked, "writes_unforeseen", watched)
    traced = follow(settled(Residual()), (X,))
    assert traced.whole is not None and not others
    assert not traced.draws


class Asked(nn.Module):
    """No graph of it can be made, as it asks for a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().mean()) > -1e9 else x * 2


LIBRARY = torch.library.Library("convrewrite_tests", "DEF")
LIBRARY.define("rectify(Tensor(a!) x) -> ()")


@torch.library.impl(LIBRARY, "rectify", "CPU")  # type: ignore[untyped-decorator]
def rectify(x: Tensor) -> None:
    x.clamp_(min=0)


def rectified(m: Calls, x: Tensor) -> Tensor:
    torch.ops.convrewrite_tests.rectify(y := m.first(x))
    return m.last(y)


def shifted(m: Calls, x: Tensor) -> Tensor:
    torch.add(m.first(x), 1.0, out=m.space)
    return m.last(m.space)


def of_its_own(**changes: object) -> nn.Module:
    """A layer of torch with attributes of its own."""
    layer = nn.ReLU()
    vars(layer).update(changes)
    return layer


def stateful(make: Callable[[Calls, Tensor], Tensor] | nn.Module) -> nn.Module:
    first, last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    if isinstance(make, nn.Module):
        return nn.Sequential(first, make, last)
    model = Calls(make, first=first, last=last)
    model.register_buffer("space", torch.zeros(1, 4, 10, 10))
    return model


@pytest.mark.parametrize("make", [rectified, shifted, Asked(), of_its_own(forward=F.silu)])
def test_what_may_keep_something_and_what_writes_to_the_model_is_noted(
    make: Callable[[Calls, Tensor], Tensor] | nn.Module,
) -> None:
    traced = follow(stateful(make).eval(), (X,))
    assert traced.whole is not None
    assert traced.stateful
