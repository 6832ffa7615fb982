"""Copies that share nothing, state that a forward changes, and the models whose copy is something else."""

import collections
import functools
import random
import sys
import threading
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convrewrite import analyze, apply, optimize, plan
from convrewrite.errors import TraceError
from convrewrite.modules.copying import copy_model, private_copy
from convrewrite.modules.hooks import hooked
from convrewrite.modules.state import Snapshot, preserved, surroundings_preserved

DATA = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X, Y = DATA[:1], DATA[1:2]


class Stateful(nn.Module):
    """Two convolutions, and between them something that keeps state; the output depends on the input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.setup()

    def setup(self) -> None:
        """What is kept."""

    def touch(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.touch(self.first(x))))


class BufferCounter(Stateful):
    def setup(self) -> None:
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def touch(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class PythonCounter(Stateful):
    def setup(self) -> None:
        self.calls = 0

    def touch(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class ListAppend(Stateful):
    def setup(self) -> None:
        self.seen: list[Tensor] = []

    def touch(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.seen[-1]


class BoundedHistory(Stateful):
    def setup(self) -> None:
        self.seen: Any = collections.deque([torch.zeros(1)], maxlen=2)

    def touch(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.seen[-1]


class CacheByShape(Stateful):
    """The least recently used are let go."""

    def setup(self) -> None:
        self.grids: collections.OrderedDict[Any, Tensor] = collections.OrderedDict()

    def touch(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        if size not in self.grids:
            self.grids[size] = torch.linspace(0, 1, size[1])
        self.grids.move_to_end(size)
        while len(self.grids) > 2:
            self.grids.popitem(last=False)
        return x + self.grids[size]


class HooksAtTheFirstCall(Stateful):
    def setup(self) -> None:
        self.relay, self.hooked = nn.Identity(), False

    def touch(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.relay.register_forward_hook(lambda _module, _args, output: 2 * output)
            self.hooked = True
        return self.relay(x)


class HookFillsClosure(Stateful):
    def setup(self) -> None:
        kept: dict[str, Tensor] = {}
        self.kept = kept
        self.relay = nn.Identity()

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            kept["x"] = output

        self.relay.register_forward_hook(hook)

    def touch(self, x: Tensor) -> Tensor:
        self.relay(x)
        return self.kept["x"]


class HookFillsUnseenDictionary(Stateful):
    """Nothing but two closures hold it."""

    def setup(self) -> None:
        kept: dict[str, Tensor] = {}
        self.relay = nn.Identity()
        self.relay.register_forward_hook(lambda _module, _args, output: kept.update(x=output))
        self.read = lambda: kept["x"]

    def touch(self, x: Tensor) -> Tensor:
        self.relay(x)
        return self.read()


class HookOfWeakOwner(Stateful):
    def setup(self) -> None:
        owner = weakref.ref(self)
        self.relay = nn.Identity()

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            owner().latest = output

        self.relay.register_forward_hook(hook)

    def touch(self, x: Tensor) -> Tensor:
        self.relay(x)
        return self.latest


class RunningMean(Stateful):
    def setup(self) -> None:
        self.register_buffer("mean", torch.zeros(16))

    def touch(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return x


class OwnGenerators(Stateful):
    """They are drawn from, and nothing of it is used."""

    def setup(self) -> None:
        self.torch_draws = torch.Generator().manual_seed(1)
        self.numpy_draws, self.python_draws = np.random.default_rng(1), random.Random(1)

    def touch(self, x: Tensor) -> Tensor:
        torch.rand(1, generator=self.torch_draws)
        self.numpy_draws.random(), self.python_draws.random()
        return x


class GlobalDraws(Stateful):
    def touch(self, x: Tensor) -> Tensor:
        torch.rand(1), np.random.random(), random.random()
        return x


class Flags(Stateful):
    def touch(self, x: Tensor) -> Tensor:
        self.first.weight.requires_grad_(False)
        self.training = True
        return x


GRIDS: dict[Any, Tensor] = {}


class GlobalCache(Stateful):
    def touch(self, x: Tensor) -> Tensor:
        if x.shape[3] not in GRIDS:
            GRIDS[x.shape[3]] = torch.linspace(0, 1, x.shape[3])
        return x + GRIDS[x.shape[3]]


class ClassCache(Stateful):
    grids: dict[str, Tensor] = {}  # noqa: RUF012

    def touch(self, x: Tensor) -> Tensor:
        self.grids["latest"] = x * 2
        return self.grids["latest"] + self.grids.setdefault("first", torch.ones(8))


STATEFUL = [
    BufferCounter, PythonCounter, ListAppend, BoundedHistory, CacheByShape, HookFillsClosure, HookFillsUnseenDictionary,
    HookOfWeakOwner, HooksAtTheFirstCall, RunningMean, GlobalCache, ClassCache, OwnGenerators, GlobalDraws, Flags,
]  # fmt: skip
every_state = pytest.mark.parametrize("make", STATEFUL, ids=lambda make: make.__name__)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def draws() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def forget(model: nn.Module) -> list[Any]:
    """State that can be compared: of generators too."""
    state = vars(model)
    generators = [state[key] for key in ("torch_draws", "numpy_draws", "python_draws") if key in state]
    return [
        part.get_state().tolist() if isinstance(part, torch.Generator)
        else part.getstate() if isinstance(part, random.Random) else str(part.bit_generator.state)
        for part in generators
    ]  # fmt: skip


@pytest.mark.slow
@every_state
def test_the_original_is_as_it_was_and_the_result_starts_where_it_stood(make: Callable[[], nn.Module]) -> None:
    model = made(make)
    with torch.no_grad():
        expected = {"x": model(X), "y": model(Y)}
    snapshot, before, random_state, own = Snapshot(model), dict(vars(model)), draws(), forget(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    training = [part.training for part in model.modules()]
    result = optimize(model, X, ["asymmetric"], DATA, {"macs": 0.7}, fast=True, measure=False)
    assert snapshot.changed() == ()
    assert {**vars(model)} == before
    assert draws() == random_state
    assert forget(model) == own == forget(result.model)
    assert [part.training for part in model.modules()] == training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for key in ("calls", "mean"):
        assert key not in state or torch.equal(result.model.state_dict()[key], state[key])
    if isinstance(model, PythonCounter):
        assert result.model.calls == model.calls == 2
    if isinstance(model, ListAppend):
        assert len(result.model.seen) == len(model.seen) == 2
    with torch.no_grad():
        assert torch.equal(model(X), expected["x"]) and torch.equal(model(Y), expected["y"])
        assert not torch.equal(result.model(X), result.model(Y))
        result.model(X)
        assert torch.equal(model(Y), expected["y"])


@every_state
def test_analysis_planning_and_applying_leave_the_original_too(make: Callable[[], nn.Module]) -> None:
    model = made(make)
    with torch.no_grad():
        model(X)
    snapshot, random_state = Snapshot(model), draws()
    analyze(model, X)
    made_plan = plan(model, X, ["asymmetric"], "weights", measure=False)
    apply(model, X, made_plan, "weights", measure=False)
    assert snapshot.changed() == ()
    assert draws() == random_state


def test_an_ordered_dictionary_is_put_back_in_its_order() -> None:
    model = made(CacheByShape)
    model.grids.update(a=torch.zeros(1), b=torch.ones(1))
    snapshot = Snapshot(model)
    model.grids.move_to_end("a")
    assert snapshot.changed() != ()
    model.grids["c"] = model.grids.pop("b")
    snapshot.restore()
    assert list(model.grids) == ["a", "b"] and snapshot.changed() == ()
    model.grids.popitem(last=False)
    assert list(model.grids.items()) == [("b", torch.ones(1))]


@pytest.mark.parametrize(("make", "held"), [(GlobalCache, GRIDS), (ClassCache, ClassCache.grids)])
def test_what_classes_and_global_names_hold_is_put_back(make: Callable[[], nn.Module], held: dict[Any, Tensor]) -> None:
    held.clear()
    analyze(made(make), X)
    assert held == {}


steps: list[str] = []
"""A record of the caller's, which the model knows nothing of."""


class NamesAttributesAlike(Stateful):
    """One of its own is called as the caller's list is, and a function within its method fills a global cache."""

    def setup(self) -> None:
        self.steps = nn.Identity()

    def touch(self, x: Tensor) -> Tensor:
        return self.steps(x) + (lambda: GRIDS.setdefault("once", torch.ones(1)))()


def test_what_the_caller_adds_meanwhile_to_what_an_attribute_is_called_as_stays() -> None:
    GRIDS.clear()
    steps.clear()
    with surroundings_preserved(made(NamesAttributesAlike)), torch.no_grad():
        made(NamesAttributesAlike)(X)
        steps.append("fit")
        assert GRIDS
    assert (steps, GRIDS) == (["fit"], {})


@dataclass(slots=True)
class Seen:
    calls: int = 0
    latest: Tensor = field(init=False)


HISTORY: list[float] = []
COUNTS, TOTAL = np.zeros(2), torch.zeros(2)
ACTIVATIONS: dict[str, Tensor] = {}


turns = 0


def note(x: Tensor) -> None:
    global turns
    turns += 1
    HISTORY.append(float(x.mean()))


def keep(_module: nn.Module, _args: object, output: Tensor) -> None:
    ACTIVATIONS["last"] = output
    COUNTS[0] += 1
    TOTAL.add_(1)


def recorded(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    calls = []

    def called(*args: Any) -> Tensor:
        calls.append(args)
        note(args[1])
        return forward(*args)

    called.calls = calls  # type: ignore[attr-defined]
    return called


class Recording(Stateful):
    """In arrays, in slots, in names of its class, and by functions that it calls or has as hooks."""

    runs = 0

    def setup(self) -> None:
        self.counts, self.bytes, self.codes, self.seen = np.zeros(2), bytearray(1), array("d", [0.0]), Seen()
        self.last.register_forward_hook(keep)

    @recorded
    def touch(self, x: Tensor) -> Tensor:
        self.counts += len(x)
        self.bytes[0] += 1
        self.codes[0] += 1
        self.seen.calls += 1
        self.seen.latest = x
        Recording.runs += 1
        Recording.newest = x  # type: ignore[attr-defined]
        return x

    def kept(self) -> str:
        return str((self.counts, self.bytes, self.codes, self.seen.calls, hasattr(self.seen, "latest")))


def kept_beside() -> str:
    beside = (HISTORY, COUNTS, TOTAL, ACTIVATIONS, Recording.touch.calls)
    return str((*beside, turns, Recording.runs, hasattr(Recording, "newest")))


@torch.no_grad()
def test_what_arrays_slots_hooks_and_helping_functions_keep_is_put_back() -> None:
    model, other = made(Recording), made(Recording)
    before, beside = model.kept(), kept_beside()
    with preserved(model):
        model(X)
        assert model.kept() != before and kept_beside() != beside
    assert (model.kept(), kept_beside()) == (before, beside)
    with surroundings_preserved(model):
        other(X)
    assert kept_beside() == beside and other.kept() != before


class Watcher:
    """Keeps the outputs of all modules."""

    def __init__(self) -> None:
        self.calls, self.outputs = 0, list[Tensor]()

    def see(self, _module: nn.Module, _args: object, output: Tensor) -> None:
        self.calls += 1
        self.outputs.append(output)


def test_what_hooks_on_all_modules_keep_is_put_back() -> None:
    watcher, seen = Watcher(), list[Tensor]()
    hooks = (watcher.see, lambda _module, _args, output: seen.append(output))
    model = nn.Identity()
    with hooked(nn.modules.module.register_module_forward_hook(hook) for hook in hooks):
        model(X)
        with surroundings_preserved(model):
            copy_model(model)(X)
    assert (watcher.calls, len(watcher.outputs), len(seen)) == (1, 1, 1)


class Gridded(nn.Module):
    @functools.lru_cache  # noqa: B019
    def grid(self, *size: int) -> Tensor:
        return torch.ones(size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.grid(*x.shape)


def test_methods_with_a_cache_keep_what_they_have_but_no_copies_of_the_model() -> None:
    model = Gridded()
    model(X)
    with surroundings_preserved(model):
        model(X[:, :1])
    assert Gridded.grid.cache_info().currsize == 2
    with surroundings_preserved(model):
        copy_model(model)(X)
    assert Gridded.grid.cache_info().currsize == 0


def test_what_belongs_to_the_process_is_not_put_back() -> None:
    model = nn.Identity()
    model.register_forward_hook(lambda *_: sys.modules.get("x") or functools.reduce)
    with surroundings_preserved(model):
        sys.modules["x"] = sys
    assert sys.modules.pop("x") is sys


class DependsOnCalls(BufferCounter):
    def touch(self, x: Tensor) -> Tensor:
        return super().touch(x) * self.calls


class DependsOnHistory(ListAppend):
    def touch(self, x: Tensor) -> Tensor:
        return super().touch(x) + sum(part.mean() for part in self.seen)


class DependsOnOwnGenerator(Stateful):
    def setup(self) -> None:
        self.draws = torch.Generator().manual_seed(0)

    def touch(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=self.draws)


class FirstShapeForEver(Stateful):
    def setup(self) -> None:
        self.offset: Tensor | None = None

    def touch(self, x: Tensor) -> Tensor:
        self.offset = x.mean() if self.offset is None else self.offset * 0.5
        return x + self.offset


class Unbuilt(Stateful):
    """Its first run makes a layer: of random numbers, or ``constant`` ones."""

    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.constant = constant

    def touch(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(16, 1, 1) if self.constant else torch.rand(16, 1, 1))
        return x * self.scale


def test_weights_that_the_first_run_draws_are_asked_for() -> None:
    assert made(lambda: private_copy(Unbuilt(True), (X,))).state_dict().keys() == Stateful().state_dict().keys()
    with pytest.raises(TraceError, match="its first run makes scale of random numbers; run the model once"):
        private_copy(made(lambda: Unbuilt(False)), (X,))
    model = Unbuilt(False).eval()
    model(X)
    assert torch.equal(private_copy(model, (X,))(X), model(X))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (DependsOnCalls, "calls"),
        (DependsOnHistory, "an object"),
        (DependsOnOwnGenerator, "an object"),
        (FirstShapeForEver, "offset"),
    ],
)
def test_a_model_whose_output_depends_on_state_is_refused(make: Callable[[], nn.Module], named: str) -> None:
    model = made(make)
    snapshot = Snapshot(model)
    with pytest.raises(TraceError, match=f"depends on state that its forward changes .*{named}"):
        optimize(model, X, ["asymmetric"], DATA, measure=False)
    assert snapshot.changed() == ()


class SharedByTheClass(Stateful):
    convs: list[nn.Module] = []  # noqa: RUF012

    def setup(self) -> None:
        type(self).convs = [nn.Conv2d(16, 16, 3, padding=1)]
        self.conv = self.convs[0]

    def touch(self, x: Tensor) -> Tensor:
        return self.convs[0](x)


def test_a_model_whose_copy_uses_the_originals_parts_is_refused() -> None:
    with pytest.raises(TraceError, match="a copy of the model uses tensors of the original"):
        optimize(made(SharedByTheClass), X, ["asymmetric"], DATA, measure=False)


def test_a_model_may_hold_the_data_from_which_its_inputs_are_cut() -> None:
    model, data = nn.Identity(), torch.rand(4, 1, 2, 2)
    model.trainer = SimpleNamespace(loader=data)
    assert private_copy(model, (data[:2],)).trainer.loader is not data


class Teacher(nn.Linear):
    """Copied as itself, as it never learns."""

    def __deepcopy__(self, _memo: Any) -> "Teacher":
        return self


def test_a_part_that_is_copied_as_itself_is_refused_and_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Teacher(2, 2))
    with pytest.raises(TraceError, match=r"found 1 itself \(Teacher\) in the copy"):
        copy_model(model)
    assert model[1].training


class InSlots(nn.Module):
    """Which ``copy.deepcopy`` leaves behind."""

    __slots__ = ("scale",)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_copy_that_does_not_run_is_told_from_a_model_that_does_not() -> None:
    model = InSlots()
    vars(InSlots)["scale"].__set__(model, 2)
    with pytest.raises(TraceError, match=r"a copy of the model does not run where the model does .*'scale'"):
        private_copy(model, (torch.ones(1, 2),))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = made(Stateful)
    model.lock = threading.Lock()
    with pytest.raises(TraceError, match="cannot be copied"):
        optimize(model, X, ["asymmetric"], DATA, measure=False)


def test_a_tensor_with_gradients_in_a_cache_is_no_obstacle() -> None:
    model = made(ListAppend)
    model(X)
    assert model.seen[0].grad_fn is not None
    found = private_copy(model, (Y,))
    assert found.seen[0].grad_fn is None
    assert torch.equal(found.seen[0], model.seen[0])
    assert len(found.seen) == len(model.seen) == 1


def test_functions_of_a_copy_share_their_cells_as_before() -> None:
    model = nn.Identity()
    count = 0

    def add() -> None:
        nonlocal count
        count += 1
        model.parts.append(count)

    model.parts, model.add, model.read = [], add, lambda: count
    found = copy_model(model)
    found.add()
    assert (found.read(), found.parts) == (1, [1])
    assert (model.read(), model.parts) == (0, [])


def test_gradients_hooks_and_flags_are_put_back() -> None:
    model = made(Stateful)
    model(X).sum().backward()
    gradient = model.first.weight.grad
    values = gradient.clone()
    model.last.requires_grad_(False)
    model.last.register_forward_hook(lambda _module, _args, output: output * 1)
    hooks = dict(model.last._forward_hooks)
    optimize(model, X, ["asymmetric"], DATA, measure=False)
    assert model.first.weight.grad is gradient
    assert torch.equal(gradient, values)
    assert not model.last.weight.requires_grad and model.first.weight.requires_grad
    assert dict(model.last._forward_hooks) == hooks


@torch.no_grad()
def test_numbers_that_a_run_changes_are_put_back() -> None:
    model = made(Stateful)
    before = model.first.weight.clone()
    with preserved(model):
        model.first.weight.mul_(2)
        model.extra = [1]
        model.last.weight.data = torch.zeros(1)
    assert torch.equal(model.first.weight, before)
    assert model.last.weight.shape == (16, 16, 3, 3)
    assert not hasattr(model, "extra")


class Conditional(nn.Module):
    """One of two convolutions, as torch.cond chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.first(x), lambda x: self.second(x), (x,))


def test_operators_that_run_functions_are_named() -> None:
    with pytest.raises(TraceError, match=r"^Conditional: .* torch\.cond, .* choose with torch\.where, or give"):
        private_copy(Conditional().eval(), (torch.randn(1, 3, 8, 8),))
