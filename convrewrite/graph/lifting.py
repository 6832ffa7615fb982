"""Functional convolutions become modules, so that they are sites like any other.

A call such as ``F.conv2d(x, self.weight)`` stands in a forward, where there is no submodule to replace. A run shows which calls
there are and of what geometry; the graph of the forward shows that a call is always the same and that nothing else needs its
tensors. What is then done is in :mod:`convrewrite.graph.lifts`.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from convrewrite.errors import ConvRewriteError
from convrewrite.graph.calls import GEOMETRY, Call, Observation, observe
from convrewrite.graph.fixed_kernels import fixed_convolutions, is_normed
from convrewrite.graph.lifts import (
    Lift,
    LiftedConv,
    apply_lifts,
    arguments_of,
    calls_in,
    changed_keys,
    possible_names,
    tensor_name,
)
from convrewrite.graph.tracing import does_more, follow_forward, qualified
from convrewrite.graph.volumes import VolumeSpec
from convrewrite.inputs import Inputs, enlarged
from convrewrite.modules import alike, copy_model, kept_outputs
from convrewrite.state import named_parameters_of
from convrewrite.values import some_of

ROUNDING = 1e3
"""Units of rounding by which outputs may differ once convolutions are modules, relative to the largest."""

SHOWN = 6
"""Most names in a note."""


@dataclass(frozen=True, slots=True)
class Lifted:
    """The model, a copy if anything was lifted; the lifts; and, by name of a weight, why a functional call on it was not lifted.

    ``notes`` say what was lifted and which state-dict keys changed, a sentence each; ``gone`` are the weights of the
    convolutions that were replaced.
    """

    model: nn.Module
    lifts: tuple[Lift, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gone: tuple[Tensor, ...] = ()


def lift(model: nn.Module, inputs: Inputs) -> Lifted:
    """Turn every functional convolution on a parameter or buffer into a module, where that changes nothing else; and every
    module that only convolves, with a kernel it computes at every call but not from the input, into a plain one.

    The model is not touched; without any of these it is returned as it is. Raises TraceError when it does not run.
    """
    seen = observe(model, inputs)
    if not _functional(model, seen) and not _computing(model, seen):
        return Lifted(model)
    plain = copy_model(model)
    seen = observe(plain, inputs)
    reasons: dict[str, str] = {}
    lifts = _fixed(plain, seen, inputs)
    for owner in dict.fromkeys(call.owner for call in _functional(plain, seen)):
        found = _Forward(plain, owner, seen).lift(reasons)
        if found is not None:
            lifts.append(found)
    if not _same_outputs(plain, lifts, inputs):
        lifts = _harmless(plain, lifts, inputs, reasons)
    if not lifts:
        return Lifted(model, reasons=reasons)
    lifted = apply_lifts(plain, lifts)
    return Lifted(lifted, tuple(lifts), reasons, lift_notes(plain, lifted, lifts))


def needed_lifts(lifts: Sequence[Lift], rewritten: Collection[str]) -> tuple[Lift, ...]:
    """The lifts that these sites, given by their names, come from."""
    needed = [(one, [conv for conv in one.convs if qualified(one.module, conv.name) in rewritten]) for one in lifts]
    return tuple(replace(one, convs=tuple(convs)) for one, convs in needed if convs)


def lift_notes(plain: nn.Module, lifted: nn.Module, lifts: Sequence[Lift]) -> tuple[str, ...]:
    """What was lifted, and which state-dict keys changed, a sentence each."""
    convs = [(one, conv) for one in lifts for conv in one.convs]
    notes = []
    for computed, text in (
        (False, "functional convolutions became modules"),
        (True, "kernels that were computed at every call, though not from the input, became constants"),
    ):
        names = [qualified(one.module, conv.name) for one, conv in convs if conv.computed == computed]
        notes += [f"{text}: {some_of(names, SHOWN)}"] if names else []
    frozen = [one.module or "the model" for one in lifts if _leaves_out(plain, one)]
    if frozen:
        notes.append(
            f"{some_of(frozen, SHOWN)} became a graph of what its forward does in eval mode: what else it does in train mode, "
            "and what it writes to its attributes, is left out"
        )
    pairs = [pair for one, conv in convs for pair in changed_keys(one, conv)]
    keys = [f"{old} is {new}" for old, new in pairs]
    before, after = plain.state_dict().keys(), lifted.state_dict().keys()
    keys += [f"{key} is new" for key in sorted(after - before - {new for _, new in pairs})]
    keys += [f"{key} is gone" for key in sorted(before - after - {old for old, _ in pairs})]
    return (*notes, f"state-dict keys are others now: {some_of(keys, SHOWN)}") if keys else tuple(notes)


def _leaves_out(plain: nn.Module, one: Lift) -> bool:
    """Whether the graph that a module becomes does less than its forward."""
    if any(conv.name == "" for conv in one.convs):
        return False
    try:
        return does_more(plain.get_submodule(one.module), one.arguments)
    except Exception:  # it cannot be followed in train mode
        return True


def _functional(model: nn.Module, seen: Observation) -> list[Call]:
    """Functional calls on a tensor that the model holds."""
    held = set(_places(model))
    calls = (call for call in seen.calls.values() if call.module is None and not isinstance(call.spec, VolumeSpec))
    return [call for call in calls if any(id(weight) in held for weight in call.weights)]


def _computing(model: nn.Module, seen: Observation) -> list[str]:
    """Modules in the model that convolve exactly once, with a kernel that they compute from anything."""
    held = set(_places(model))
    functional = [call for call in seen.calls.values() if call.module is None]
    computed = [call.owner for call in functional if not any(id(weight) in held for weight in call.weights)]
    normed = [call.owner for call in seen.calls.values() if call.module is not None and is_normed(call.module)]
    return [owner for owner, calls in Counter(computed + normed).items() if owner and calls == 1]


def _fixed(model: nn.Module, seen: Observation, inputs: Inputs) -> list[Lift]:
    """The modules whose kernel does not depend on the input."""
    alone = [name for name in _computing(model, seen) if _replaceable(model.get_submodule(name))]
    return [
        Lift(name, ("input",), (LiftedConv("weight", "bias" if spec.bias else None, "", spec, computed=True),))
        for name, spec in fixed_convolutions(model, alone, inputs).items()
    ]


def _replaceable(module: nn.Module) -> bool:
    """Whether there are no hooks that a plain convolution in its place would lack."""
    return is_normed(module) or not (module._forward_hooks or module._forward_pre_hooks)


def _places(model: nn.Module) -> dict[int, list[str]]:
    """The id of every parameter and buffer -> its names."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append(qualified(name, key))
    return found


class _Forward:
    """The forward of one module, as a graph, with the functional convolutions that a run saw in it."""

    def __init__(self, model: nn.Module, owner: str, seen: Observation) -> None:
        self._model = model
        self._owner = owner
        self._seen = seen
        self._module = model.get_submodule(owner)
        self._places = _places(model)
        self._tensors = dict([*named_parameters_of(self._module), *self._module.named_buffers()])
        self._calls = [call for call in _functional(model, seen) if call.owner == owner]
        self._graph: fx.Graph | None = None

    def lift(self, reasons: dict[str, str]) -> Lift | None:
        """What can be lifted here; why other weights cannot is added to ``reasons``."""
        weights = {id(w): w for call in self._calls for w in call.weights if id(w) in self._places}
        obstacle = self._obstacle()
        convs: list[LiftedConv] = []
        for weight in weights.values():
            found = obstacle or self._conv(weight, {conv.name for conv in convs})
            if isinstance(found, LiftedConv):
                convs.append(found)
            else:
                reasons[self._places[id(weight)][0]] = found
        return Lift(self._owner, self._calls[0].given[0], tuple(convs)) if convs else None

    def _obstacle(self) -> str | None:
        """Why no call here can be lifted."""
        where = self._owner or "the model"
        if self._module._forward_hooks or self._module._forward_pre_hooks:
            return f"{where} has forward hooks, which a graph would lose"
        odd = next((call.refusal for call in self._calls if call.refusal), None)
        if odd is not None:
            return odd
        if len({given for call in self._calls for given in call.given}) > 1:
            return f"{where} is called with different arguments"
        try:
            self._graph = follow_forward(self._module, self._calls[0].given[0]).graph
        except Exception:  # a forward may fail in any way while it is being followed
            return f"the forward of {where} cannot be followed as a graph"
        return None

    def _conv(self, weight: Tensor, taken: set[str]) -> LiftedConv | str:
        """The convolution with this weight, or why it cannot be lifted."""
        assert self._graph is not None
        key = next((name for name, tensor in self._tensors.items() if tensor is weight), None)
        nodes = [] if key is None else [n for n in calls_in(self._graph) if tensor_name(n, "weight") == key]
        if key is None or not nodes:
            return "it is computed anew before the call"
        for name in GEOMETRY:
            if any(_depends_on_nodes(arguments_of(node).get(name)) for node in nodes):
                return f"the {name.replace('_', ' ')} is computed at every call"
        specs = {call.spec for call in self._calls if any(w is weight for w in call.weights)}
        if len(specs) > 1:
            return "it is called with different geometries"
        spec = specs.pop()
        biases = {tensor_name(node, "bias") for node in nodes}
        bias = biases.pop()
        if biases or (bias in self._tensors) != spec.bias:
            return "the bias is computed at every call"
        other = self._other_use(key, "weight", nodes)
        if other is None and bias is not None:
            other = self._other_use(bias, "bias", nodes)
        return other or LiftedConv(key, bias, self._name(key, bias, nodes, taken), spec)

    def _other_use(self, key: str, role: str, nodes: Sequence[fx.Node]) -> str | None:
        """What else uses a tensor that would belong to the convolution alone; None if nothing does."""
        assert self._graph is not None
        tensor = self._tensors[key]
        if len(self._places[id(tensor)]) > 1:
            return f"{key} is shared under the names {', '.join(self._places[id(tensor)])}"
        users = set(self._seen.users.get(id(tensor), ()))
        calls = [call for call in self._seen.calls.values() if call.owner != self._owner]
        users |= {call.owner for call in calls if any(t is tensor for t in (*call.weights, *call.biases))}
        in_graph = {user for node in self._graph.nodes if _is_tensor(node, key) for user in node.users}
        elsewhere = any(tensor_name(n, role) != key or _uses(n, key) > 1 for n in in_graph)
        if users or elsewhere or in_graph - set(nodes):
            where = ", ".join(sorted(name or "the model" for name in users)) or self._owner or "the model"
            return f"{where} uses {key} for something else too"
        return None

    def _name(self, key: str, bias: str | None, nodes: Sequence[fx.Node], taken: set[str]) -> str:
        """Where the convolution is put: in place of a module that only holds its tensors, otherwise of the weight."""
        assert self._graph is not None
        whole = bool(self._owner) and len(nodes) == 1 and _is_all(self._graph, nodes[0])
        path = key.rpartition(".")[0]
        called = bool(self._seen.runs[id(self._module.get_submodule(path))])
        usable = {"": whole, path: not called} if path else {"": whole}
        return next(name for name in possible_names(self._module, key, bias, taken) if usable.get(name, True))


def _is_tensor(node: fx.Node, key: str) -> bool:
    return node.op == "get_attr" and str(node.target) == key


def _uses(node: fx.Node, key: str) -> int:
    """How many arguments of a node are the tensor of this name."""
    return sum(
        1 for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node) and _is_tensor(value, key)
    )


def _depends_on_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg((value,), found.append)
    return bool(found)


def _is_all(graph: fx.Graph, call: fx.Node) -> bool:
    """Whether a graph does nothing but call this one function on its one input."""
    rest = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output") and n is not call]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    return not rest and len(inputs) == 1 and output.args == (call,) and arguments_of(call)["input"] is inputs[0]


def _same_outputs(model: nn.Module, lifts: Sequence[Lift], inputs: Inputs) -> bool:
    """Whether the model computes the same with these convolutions as modules (from the same seed, if it draws numbers), also at
    other sizes that it takes: a forward that catches its own error, or that looks a size up, is followed at one size only."""
    try:
        lifted = apply_lifts(model, lifts)
        if not alike(kept_outputs(model, inputs, silent=True), kept_outputs(lifted, inputs, silent=True), ROUNDING):
            return False
    except ConvRewriteError:
        return False
    return all(_same_if_taken(model, lifted, others) for others in enlarged(inputs)) if lifts else True


def _same_if_taken(model: nn.Module, lifted: nn.Module, inputs: Inputs) -> bool:
    """Whether the lifted model gives the same on these inputs, if the model takes them at all."""
    try:
        expected = kept_outputs(model, inputs, silent=True)
    except ConvRewriteError:
        return True
    try:
        return alike(expected, kept_outputs(lifted, inputs, silent=True), ROUNDING)
    except ConvRewriteError:
        return False


def _harmless(plain: nn.Module, lifts: Sequence[Lift], inputs: Inputs, reasons: dict[str, str]) -> list[Lift]:
    """The lifts, tried one after another, that leave the outputs as they are; why others do not is added to ``reasons``."""
    kept: list[Lift] = []
    for one in lifts:
        if _same_outputs(plain, [*kept, one], inputs):
            kept.append(one)
            continue
        where = one.module or "the model"
        reasons |= {qualified(one.module, c.weight): f"{where} does not compute the same as a graph" for c in one.convs}
    return kept
