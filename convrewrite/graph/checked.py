"""Graphs that are known to compute what the modules compute.

Following a forward can go wrong in silence: ``isinstance(x, Tensor)`` is false for what a tracer passes for a tensor, and the
graph then has the other branch. So each graph is run once beside its module, and one that gives something else is dropped.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from convrewrite.errors import TraceError
from convrewrite.graph.sized import trace_sized
from convrewrite.graph.tracing import Traced, trace
from convrewrite.inputs import Inputs, varied
from convrewrite.modules import alike, hooked, named_outputs, run


def follow(model: nn.Module, inputs: Inputs) -> Traced:
    """:func:`convrewrite.graph.tracing.trace` without the graphs that compute something else on ``inputs`` than their modules.

    What is inside of a module whose graph is dropped is followed part by part, as where there is none. The model is used
    in the mode it is in. Raises TraceError when it does not run on ``inputs``.
    """
    traced = trace(model, len(inputs))
    sized = _sized(model, inputs) if traced.whole is None else None
    found = _checked(model, traced, inputs)
    return found if sized is None else replace(sized, unsized=found.parts)


def _checked(model: nn.Module, traced: Traced, inputs: Inputs) -> Traced:
    """Without the graphs that compute something else."""
    parts: dict[str, fx.GraphModule] = {}
    lost = list(traced.lost)
    waiting = list(traced.parts.items())
    while waiting:
        name, graph = waiting.pop(0)
        if _computes_the_same(model, name, graph, inputs):
            parts[name] = graph
            continue
        lost.append(name)
        for key, child in model.get_submodule(name).named_children():
            if next(child.children(), None) is None:
                continue
            path = f"{name}.{key}" if name else key
            inner = trace(child)
            lost += [f"{path}.{part}" if part else path for part in inner.lost]
            waiting += [(f"{path}.{part}" if part else path, graph) for part, graph in inner.parts.items()]
    return Traced(parts, tuple(lost))


def _sized(model: nn.Module, inputs: Inputs) -> Traced | None:
    """One graph for inputs of these sizes in batches of any; None where there is none."""
    traced = trace_sized(model, inputs)
    if traced.whole is None or not _computes_the_same(model, "", traced.whole, inputs):
        return None
    others = tuple(torch.cat([tensor, tensor.flip(-1)]) for tensor in inputs)
    try:
        run(model, others)
    except TraceError:  # it takes this batch alone
        return traced
    return traced if _computes_the_same(model, "", traced.whole, others) else None


def _computes_the_same(model: nn.Module, name: str, graph: fx.GraphModule, inputs: Inputs) -> bool:
    """Whether a part's graph gives what the part gives at its first call; a part that is never called is not asked. On other
    numbers too: what a forward found in a cache or a dictionary when it was followed is a constant of the graph."""
    if not _same_at_first_call(model, name, graph, inputs):
        return False
    try:
        return _same_at_first_call(model, name, graph, varied(inputs))
    except TraceError:  # it does not run on these numbers
        return True


def _same_at_first_call(model: nn.Module, name: str, graph: fx.GraphModule, inputs: Inputs) -> bool:
    with torch.random.fork_rng(), torch.no_grad():
        call = _first_call(model, name, inputs)
        if call is None:
            return True
        args, kwargs, random, expected = call
        torch.set_rng_state(random)
        try:
            found = named_outputs(graph.forward(*args, **kwargs))  # called itself, it prints how it failed
        except Exception:  # a graph that was followed wrongly may fail in any way
            return False
    return alike(expected, found)


def _first_call(
    model: nn.Module, name: str, inputs: Inputs
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, dict[str, Tensor]] | None:
    """Copies of what a part is given at its first call, the random state then, and what it returns."""
    part = model.get_submodule(name)
    given: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    returned: list[dict[str, Tensor]] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not given:
            given.append((copy.deepcopy(args), copy.deepcopy(kwargs), torch.get_rng_state()))

    def leave(_module: nn.Module, _args: object, output: object) -> None:
        if not returned:
            returned.append({key: tensor.clone() for key, tensor in _outputs(output).items()})

    with hooked((part.register_forward_pre_hook(enter, with_kwargs=True), part.register_forward_hook(leave))):
        run(model, inputs)
    return (*given[0], returned[0]) if given and returned else None


def _outputs(output: object) -> dict[str, Tensor]:
    try:
        return named_outputs(output)
    except TraceError:  # a part may return anything
        return {}
