"""Graphs that are known to compute what the modules compute.

Following a forward can go wrong in silence: ``type(x) is Tensor`` is false for what a tracer passes in place of a tensor, and the
graph then has the wrong branch. So each graph is run beside its module, and dropped if it gives something else.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from convrewrite.errors import TraceError
from convrewrite.graph.arguments import GivenToParts, named_values
from convrewrite.graph.sized import trace_sized
from convrewrite.graph.stateful import keeps_state, writes_unforeseen
from convrewrite.graph.tracing import Traced, joined, trace
from convrewrite.inputs import Inputs, enlarged, varied
from convrewrite.modules import alike, hooked, named_outputs, run
from convrewrite.process import FAKE_TENSORS, draw_from, quiet, random_states_kept, without_draws


def follow(model: nn.Module, inputs: Inputs) -> Traced:
    """:func:`convrewrite.graph.tracing.trace` without the graphs that compute something else on ``inputs`` than their modules.

    The inside of a module whose graph is dropped is followed part by part, as if it had none. The model is used
    in the mode it is in. Raises TraceError when it does not run on ``inputs``.
    """
    given = GivenToParts(model, inputs)
    found = _checked(trace(model, len(inputs), given=given), given)
    sized = _sized(model, inputs) if found.whole is None else None
    followed = found if sized is None else replace(sized, unsized=found.parts)
    if followed.whole is None:
        return followed
    if keeps_state(followed.whole):
        return replace(followed, stateful=True)
    return _told_of_its_run(followed, followed.whole, inputs)


def _told_of_its_run(followed: Traced, whole: fx.GraphModule, inputs: Inputs) -> Traced:
    """With what one more run of the whole graph shows of it."""
    try:
        stateful = without_draws(partial(writes_unforeseen, whole, inputs))
    except RuntimeError:
        return replace(followed, draws=True)
    return replace(followed, stateful=stateful)


def _checked(traced: Traced, given: GivenToParts) -> Traced:
    """``traced`` without the graphs that compute something else than their modules."""
    model, inputs = given.model, given.inputs
    parts: dict[str, fx.GraphModule] = {}
    lost = list(traced.lost)
    waiting = dict(traced.parts)
    while waiting:
        same = _computing_the_same(model, waiting, inputs)
        parts |= {name: graph for name, graph in waiting.items() if name in same}
        dropped = [name for name in waiting if name not in same]
        lost += dropped
        inside = [_inside(name, given) for name in dropped]
        lost += [name for inner in inside for name in inner.lost]
        waiting = {name: graph for inner in inside for name, graph in inner.parts.items()}
    return Traced(parts, tuple(lost))


def _inside(name: str, given: GivenToParts) -> Traced:
    """What can be followed inside a part whose own graph was dropped, by names in the model."""
    parts: dict[str, fx.GraphModule] = {}
    lost: list[str] = []
    for key, child in given.model.get_submodule(name).named_children():
        if next(child.children(), None) is None:
            continue
        path = joined(name, key)
        inner = trace(child, given=given)
        lost += [joined(path, part) for part in inner.lost]
        parts |= {joined(path, part): graph for part, graph in inner.parts.items()}
    return Traced(parts, tuple(lost))


def _sized(model: nn.Module, inputs: Inputs) -> Traced | None:
    """One graph for inputs of these sizes and any batch size; None where there is none."""
    with quiet((FAKE_TENSORS,)):
        traced = trace_sized(model, inputs)
    if traced.whole is None or not _computing_the_same(model, traced.parts, inputs):
        return None
    others = next(enlarged(inputs))
    try:
        run(model, others)
    except TraceError:  # it takes this batch alone
        return traced
    return traced if _computing_the_same(model, traced.parts, others) else None


def _computing_the_same(model: nn.Module, graphs: Mapping[str, fx.GraphModule], inputs: Inputs) -> set[str]:
    """The parts whose graph gives what the part gives at its first call, and those that are never called. Graphs are tried on
    other numbers too: what a forward found in a cache or a dictionary when it was followed is a constant of the graph."""
    same = _same_at_first_calls(model, graphs, inputs)
    if not same:
        return same
    try:
        return _same_at_first_calls(
            model, {name: graph for name, graph in graphs.items() if name in same}, varied(inputs)
        )
    except TraceError:  # it does not run on these numbers
        return same


def _same_at_first_calls(model: nn.Module, graphs: Mapping[str, fx.GraphModule], inputs: Inputs) -> set[str]:
    """One run of the model shows the calls of all parts."""
    with random_states_kept(), torch.no_grad():
        calls = _first_calls(model, graphs, inputs)
        return {
            name
            for name, graph in graphs.items()
            if name not in calls or _gives(model.get_submodule(name), graph, calls.pop(name))
        }


def _gives(part: nn.Module, graph: fx.GraphModule, call: "_FirstCall") -> bool:
    """Whether a graph gives what a part returned."""
    if not call.plain:
        return False
    named = named_values(part, call.args, call.kwargs)
    args, kwargs = (call.args, call.kwargs) if named is None else ((), named)
    draw_from(call.random)
    try:
        found = named_outputs(graph.forward(*args, **kwargs))  # called itself, it prints how it failed
    except Exception:  # a graph that was followed wrongly may fail in any way
        return False
    return alike(call.returned, found)


@dataclass(slots=True)
class _FirstCall:
    """Copies of what a part is given at its first call and of what it returns, and the random state then. ``plain``: whether
    all are ordinary tensors, which can be copied, and not the wrapped ones that torch.func passes to a function."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    random: Tensor = field(default_factory=torch.get_rng_state)
    returned: dict[str, Tensor] = field(default_factory=dict)
    plain: bool = True


def _first_calls(model: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, _FirstCall]:
    """The first calls of parts, without those that are not called, or do not return. That of the model itself, ``""``, has what
    a caller gives and gets: its own hooks, and a ``__call__`` of its class, may change both, and its graph has neither."""
    begun: dict[str, _FirstCall] = {}
    ended: dict[str, _FirstCall] = {}

    def enter(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in begun:
            begun[name] = _entered(args, kwargs)

    def leave(name: str, _module: nn.Module, _args: object, output: object) -> None:
        if name not in ended:
            call = ended[name] = begun[name]
            tensors = _outputs(output)
            call.plain &= not any(map(_is_wrapped, tensors.values()))
            call.returned = {key: tensor.clone() for key, tensor in tensors.items()}

    def handles() -> Iterator[RemovableHandle]:
        for name in names:
            part = model.get_submodule(name)
            yield part.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
            yield part.register_forward_hook(partial(leave, name))

    with hooked(handles()):
        output = run(model, inputs)
    if "" in ended:
        returned = {key: tensor.clone() for key, tensor in _outputs(output).items()}
        given = tuple(tensor.clone() for tensor in inputs)
        ended[""] = replace(ended[""], args=given, kwargs={}, returned=returned)
    return ended


def _entered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _FirstCall:
    """A call that begins. A tensor in a graph of gradients, which ``deepcopy`` refuses, is copied without that graph."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(map(_is_wrapped, tensors)):
        return _FirstCall(plain=False)
    copies: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    return _FirstCall(*copy.deepcopy((args, kwargs), copies), torch.get_rng_state())


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _outputs(output: object) -> dict[str, Tensor]:
    try:
        return named_outputs(output)
    except TraceError:  # a part may return anything
        return {}
