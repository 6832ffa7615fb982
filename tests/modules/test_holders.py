"""Every holder of a part of a model: that it is found, and that a replacement gets there."""

import collections
import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convrewrite import optimize
from convrewrite.graph.finding import HELD_ELSEWHERE
from convrewrite.modules.copying import copy_model
from convrewrite.modules.holders import LIMIT, is_plain, reachable, replace_modules, replace_parts

DATA = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    conv: nn.Module
    name: str


@dataclass(frozen=True)
class Frozen:
    conv: nn.Module


@dataclass(slots=True)
class Slotted:
    conv: nn.Module
    others: list[int] = field(default_factory=list)


class Plain:
    def __init__(self, conv: nn.Module) -> None:
        self.conv = conv

    def call(self, x: Tensor) -> Tensor:
        return self.conv(x)


def closure(conv: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return conv(x)

    return call


def default(conv: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x, conv=conv: conv(x)


def keyword_default(conv: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor, *, conv: nn.Module = conv) -> Tensor:
        return conv(x)

    return call


def applied(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def weak_values(conv: nn.Module) -> Any:
    found = weakref.WeakValueDictionary()
    found["conv"] = conv
    return found


def weak_keys(conv: nn.Module) -> Any:
    found: Any = weakref.WeakKeyDictionary()
    found[conv] = 1
    return found


Use = Callable[[Any, Tensor], Tensor]
HOLDERS: dict[str, tuple[Callable[[nn.Module], Any], Use]] = {
    "list": (lambda conv: [conv], lambda held, x: held[0](x)),
    "nested list": (lambda conv: [[conv]], lambda held, x: held[0][0](x)),
    "dict": (lambda conv: {"conv": conv}, lambda held, x: held["conv"](x)),
    "dict key": (lambda conv: {conv: 1}, lambda held, x: next(iter(held))(x)),
    "tuple": (lambda conv: (1, conv), lambda held, x: held[1](x)),
    "named tuple": (lambda conv: Pair(conv, "a"), lambda held, x: held.conv(x)),
    "set": (lambda conv: {conv}, lambda held, x: next(iter(held))(x)),
    "frozenset": (lambda conv: frozenset([conv]), lambda held, x: next(iter(held))(x)),
    "deque": (lambda conv: collections.deque([conv]), lambda held, x: held[0](x)),
    "ordered dict": (lambda conv: collections.OrderedDict(a=conv), lambda held, x: held["a"](x)),
    "ordered dict key": (lambda conv: collections.OrderedDict([(conv, 1)]), lambda held, x: next(iter(held))(x)),
    "read-only dict": (lambda conv: types.MappingProxyType({"a": conv}), lambda held, x: held["a"](x)),
    "values of a dict": (lambda conv: {"a": conv}.values(), lambda held, x: next(iter(held))(x)),
    "items of an ordered dict": (
        lambda conv: collections.OrderedDict(a=conv).items(),
        lambda held, x: dict(held)["a"](x),
    ),
    "partial": (lambda conv: functools.partial(applied, conv), lambda held, x: held(x)),
    "partial of it": (lambda conv: functools.partial(conv), lambda held, x: held(x)),
    "partial keyword": (lambda conv: functools.partial(applied, module=conv), lambda held, x: held(x=x)),
    "closure": (closure, lambda held, x: held(x)),
    "default argument": (default, lambda held, x: held(x)),
    "keyword default": (keyword_default, lambda held, x: held(x)),
    "another object": (Plain, lambda held, x: held.conv(x)),
    "namespace": (lambda conv: types.SimpleNamespace(conv=conv), lambda held, x: held.conv(x)),
    "frozen dataclass": (Frozen, lambda held, x: held.conv(x)),
    "slots": (Slotted, lambda held, x: held.conv(x)),
    "bound method of it": (lambda conv: conv.__call__, lambda held, x: held(x)),
    "bound method of an object": (lambda conv: Plain(conv).call, lambda held, x: held(x)),
    "weak reference": (weakref.ref, lambda held, x: held()(x)),
    "weak proxy": (lambda conv: [weakref.proxy(conv)], lambda held, x: held[0](x)),
    "weak values": (weak_values, lambda held, x: held["conv"](x)),
    "weak keys": (weak_keys, lambda held, x: next(iter(held.keys()))(x)),
    "list in a closure": (lambda conv: closure_over([conv]), lambda held, x: held(x)),
}


def closure_over(convs: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    return lambda x: convs[0](x)


class Holding(nn.Module):
    """A convolution that is an attribute, and that the forward finds in another holder."""

    def __init__(self, hold: Callable[[nn.Module], Any], use: Use) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.held = hold(self.conv)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.held, torch.relu(self.stem(x)))


every_holder = pytest.mark.parametrize(("hold", "use"), HOLDERS.values(), ids=HOLDERS.keys())


def holding(hold: Callable[[nn.Module], Any], use: Use) -> Holding:
    torch.manual_seed(0)
    return Holding(hold, use).eval()


def counted(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2 // len(x)


@every_holder
@torch.no_grad()
def test_a_replacement_gets_to_every_holder(hold: Callable[[nn.Module], Any], use: Use) -> None:
    model = holding(hold, use)
    conv, other = model.conv, nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    found = copy_model(model)
    assert torch.equal(found(DATA), model(DATA))
    replace_modules(found, {id(found.conv): other})
    assert torch.equal(found(DATA), other(torch.relu(model.stem(DATA))))
    assert model.conv is conv
    assert not torch.equal(model(DATA), found(DATA))


@pytest.mark.slow
@every_holder
def test_what_is_reported_as_rewritten_runs(hold: Callable[[nn.Module], Any], use: Use) -> None:
    model = holding(hold, use)
    with torch.no_grad():
        expected = model(DATA)
    result = optimize(model, DATA[:1], ["asymmetric"], DATA, {"macs": 0.6}, fast=True, measure=False)
    assert {row.name: row.action for row in result.report.sites}["conv"] == "rewritten"
    assert result.report.totals.macs.before == counted(model, DATA[:1])
    assert result.report.totals.macs.after == counted(result.model, DATA[:1])
    with torch.no_grad():
        assert torch.equal(model(DATA), expected)
        assert not torch.equal(result.model(DATA), expected)
    shared = {id(part) for part in reachable(model)} & {id(part) for part in reachable(result.model)}
    assert not [part for part in reachable(model) if id(part) in shared and isinstance(part, Tensor | nn.Module)]


def test_a_holder_that_nothing_gets_to_keeps_its_site() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.other = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return everywhere.setdefault(self, self.conv)(self.other(self.stem(x)))

    everywhere: Any = weakref.WeakKeyDictionary()  # the forward of a class has it, where no copy and no search gets to
    report = optimize(Hidden().eval(), DATA[:1], ["asymmetric"], "weights", measure=False).report
    rows = {row.name: row for row in report.sites}
    assert (rows["other"].action, rows["conv"].action) == ("rewritten", "kept")
    assert rows["conv"].reason == HELD_ELSEWHERE
    assert report.totals.macs.after > rows["conv"].macs_before


def test_a_module_that_is_its_own_part_through_a_list_is_walked_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model.everything = [model, model[0]]
    assert sum(part is model for part in reachable(model)) == 1
    other = nn.Identity()
    replace_modules(model, {id(model[0]): other})
    assert model[0] is other
    assert model.everything == [model, other]


def test_what_belongs_to_the_process_is_not_followed() -> None:
    assert all(is_plain(value) for value in (torch, nn.Conv2d, applied, torch.relu, 1, "text", torch.float32))
    assert not any(is_plain(value) for value in ([], closure(nn.Identity()), default(nn.Identity())))
    model = nn.Identity()
    model.things = [torch, nn.Module, applied]
    found = list(reachable(model))
    assert not any(isinstance(part, types.ModuleType | type) for part in found)
    assert len(found) < 50 < LIMIT


def test_a_cached_method_and_a_method_of_a_list_go_with_their_owners() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            self.note = self.seen.append
            self.scale = functools.lru_cache(self.computed)

        def computed(self, size: int) -> float:
            self.note(size)
            return 1.0 / size

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale(len(x))

    model = Caching()
    found = copy_model(model)
    found(DATA)
    assert (found.seen, model.seen) == ([len(DATA)], [])
    model(DATA[:2])
    assert (found.seen, model.seen) == ([len(DATA)], [2])


def test_holders_nested_too_deep_end_in_a_clear_error() -> None:
    from convrewrite.errors import TraceError

    model, deep = nn.Identity(), []
    model.deep = deep
    for _ in range(5000):
        deep.append([])
        deep = deep[0]
    with pytest.raises(TraceError, match="nested too deep"):
        replace_parts((model,), {})
