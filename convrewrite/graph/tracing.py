"""torch.fx graphs of any module: whole where that works, otherwise part by part.

A graph gives what running a model cannot: which module's output goes where, and into nothing else. Rewriting does not need
it (submodules are replaced through their parents), so a model without a graph loses only what is said in ``lost``. A part
that cannot be followed but holds no convolution loses nothing: it is one node of the graph around it, like a layer of torch.
"""

import contextlib
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from convrewrite.graph.arguments import GivenToParts, defaults_of, names_given
from convrewrite.modules import Operator, Snapshot
from convrewrite.process import followed, without_draws

FUNCTIONS_OF_EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack", "parse_shape")
"""Those that take tensors."""


@dataclass(frozen=True, slots=True)
class Traced:
    """The graphs of a model: one under the name ``""`` when it could be followed whole, otherwise those of its parts.

    ``lost``: the parts that could not be followed and hold convolutions. ``unsized``: if the whole was followed for inputs of
    one size, the graphs of its parts that hold for any size; None: all graphs do. ``draws``: whether the model draws random
    numbers, so that two runs are alike only from their beginning on. ``stateful``: whether its nodes, or its runs, may hand on
    something beside its graph. Neither is found out where there is no whole graph.
    """

    parts: dict[str, fx.GraphModule]
    lost: tuple[str, ...]
    unsized: Mapping[str, fx.GraphModule] | None = None
    draws: bool = False
    stateful: bool = False

    @property
    def whole(self) -> fx.GraphModule | None:
        """The graph of the whole model, every convolution a node of it; None when it could not be followed whole."""
        return self.parts.get("") if not self.lost else None

    @property
    def at_any_size(self) -> Mapping[str, fx.GraphModule]:
        """The graphs that hold for inputs of any size: a forward that asks for the size may take another path at another one."""
        return self.parts if self.unsized is None else self.unsized


def trace(
    model: nn.Module,
    inputs: int = 1,
    tracer: "MakeTracer | None" = None,
    given: GivenToParts | None = None,
) -> Traced:
    """Follow ``model`` whole if possible; otherwise leave out the innermost modules that fail and follow those inside.

    The first ``inputs`` arguments of its ``forward`` are given, those that ``given`` knows of a part inside, or its first one;
    optional ones behind them take their defaults. ``tracer`` makes the tracer that follows the whole model, given the names of
    submodules to be left opaque.
    """
    parts: dict[str, fx.GraphModule] = {}
    lost: list[str] = []
    waiting = [("", model)]
    before = Snapshot(model, parameters=False)
    while waiting:
        name, module = waiting.pop(0)
        count, make = (1, OpaqueTracer) if name else (inputs, tracer or OpaqueTracer)
        names = (given.of(module) if given else ()) or names_given(module, count)
        graph, opaque = _follow(module, count, names, make, before)
        if graph is not None:
            parts[name] = graph
        for inner in opaque:
            child = module.get_submodule(inner)
            if graph is not None and not _convolves(child):
                continue
            path = joined(name, inner)
            lost += [path] if _has_forward(child) else []
            waiting += [(joined(path, key), sub) for key, sub in child.named_children() if _may_be_followed(sub)]
    return Traced(parts, tuple(lost))


def qualified(part: str, target: object) -> str:
    """The name in the whole model of what a part's graph calls ``target``."""
    return joined(part, str(target))


def _follow(
    module: nn.Module, count: int, names: Sequence[str], make_tracer: "MakeTracer", before: Snapshot
) -> tuple[fx.GraphModule | None, list[str]]:
    """A graph of ``module`` and the names of the submodules that had to be left opaque in it (``""``: itself). What following
    changes in modules, and in what they hold, is put back as it was ``before``."""
    opaque: list[str] = []
    while True:
        tracer = make_tracer(frozenset(opaque))
        tracer.inputs = count
        try:
            with followed():
                graph = tracer.trace(module, concrete_args=defaults_of(module, names))
                _drop_defaults(graph, module)
                before.restore()  # an attribute may hold a proxy now: self.mean = self.mean.type_as(x)
                _hold(module, tracer.tensor_attrs)
                return fx.GraphModule(module, graph), opaque
        except Exception:  # a forward may fail in any way while it is being followed
            failed = tracer.failed or ""
            if failed == "" or failed in opaque:
                return None, [""]
            opaque.append(failed)
        finally:
            before.restore()


def _hold(module: nn.Module, tensors: Mapping[Any, str]) -> None:
    """Make attributes of a module of the constants that its graph has, by their names."""
    for tensor, name in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, tensor)


def follow_forward(module: nn.Module, given: Collection[str]) -> fx.GraphModule:
    """The graph of this module's own forward, its submodules being single nodes of it.

    The parameters of the forward that are not ``given`` take their defaults. What following it raises is passed on; the
    module itself stays as it is. Raises RuntimeError for a forward that draws a random number which would be a constant.
    """
    return without_draws(functools.partial(_followed_forward, module, given))


def _followed_forward(module: nn.Module, given: Collection[str]) -> fx.GraphModule:
    before = Snapshot(module, parameters=False)
    try:
        with followed():
            traced, constants = _own_forward(module, given)
            graph = fx.Graph()  # a copy does not know the tracer, which a pickle would name
            graph.output(graph.graph_copy(traced, {}))
            before.restore()
            _hold(module, constants)
            return fx.GraphModule(module, graph, type(module).__name__)
    finally:
        before.restore()


def does_more(module: nn.Module, given: Collection[str]) -> bool:
    """Whether this module's own forward does more than its graph in eval mode says: it does something else in train mode, or
    changes its attributes or what they hold. What following it raises is passed on."""
    before = Snapshot(module, parameters=False)
    try:
        with followed():
            held = _held(module)
            graph = str(_own_forward(module, given)[0])
            writes = _held(module) != held or before.contents_changed()
            before.restore()
            module.training = not module.training
            return writes or str(_own_forward(module, given)[0]) != graph
    finally:
        before.restore()


def _held(module: nn.Module) -> dict[str, int]:
    """The ids of the objects in a module's attributes, by name, without the constants that a tracer puts there."""
    held = vars(module) | module._parameters | module._buffers
    return {name: id(value) for name, value in held.items() if not name.startswith("_tensor_constant")}


def _own_forward(module: nn.Module, given: Collection[str]) -> tuple[fx.Graph, Mapping[Any, str]]:
    """The graph of a module's own forward, and the names of its constants, to which the numbers in a buffer belong where it asks
    for them. Raises RuntimeError where following it changes numbers, as the graph would not repeat the change."""
    before = Snapshot(module, parameters=False)
    tracer = _OwnForward(buffers=True)
    try:
        traced = tracer.trace(module, concrete_args=defaults_of(module, given))
    except Exception:  # a forward may fail in any way while it is being followed
        before.restore()
        tracer = _OwnForward(buffers=False)
        traced = tracer.trace(module, concrete_args=defaults_of(module, given))
    if before.numbers_changed():
        raise RuntimeError("it changes a tensor in a way that no graph can be made of")
    _drop_defaults(traced, module)
    return traced, tracer.tensor_attrs


class WritableProxy(fx.Proxy):
    """A value whose entries may be written: ``y[:, 1:] = x``, which torch.fx itself does not take."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other


class _PartsTracer(fx.Tracer):
    """Makes nodes only of modules in the model: a module that is held elsewhere has no name, so its forward is followed.

    ``inputs``: how many a forward is given that takes any number of them.
    """

    inputs = 1

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the value of a node while a forward is followed."""
        return WritableProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """What stands for a value in the arguments of a node: for a proxy its node, before fx asks whether it is a tensor; for a
        number of numpy one of Python, whose text is code."""
        if isinstance(a, fx.Proxy):
            return a.node
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """What to call, and with which values, to follow a module's forward: its own one, where it has one instead of its
        class's. One that a decorator wraps is called with what is given alone: fx itself would fill the decorator's ``*args``
        and ``**kwargs`` with single arguments of the forward. So is one with a tuple, list or dictionary among its defaults: fx
        itself would take it apart, and the graph would return a flat list of what the forward returns."""
        own, defaults = vars(self.root).get("forward"), concrete_args or {}
        if own is None and inspect.unwrap(root_fn) is root_fn and not any(map(_is_container, defaults.values())):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        function = functools.partial(root_fn, self.root) if own is None else own
        parameters = inspect.signature(function).parameters.values()
        given = [p for p in parameters if p.name not in defaults and p.kind is not p.VAR_KEYWORD]
        if own is not None and [p.kind for p in given] == [inspect.Parameter.VAR_POSITIONAL]:  # torch.compile made it
            given = [inspect.Parameter(f"{given[0].name}_{i}", given[0].POSITIONAL_ONLY) for i in range(self.inputs)]
        if any(p.kind is p.VAR_POSITIONAL for p in given):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        values = {p.name: self.create_proxy("placeholder", p.name, (), {}) for p in given}
        first = list(takewhile(lambda p: p.name not in defaults, parameters))  # behind them, place alone tells nothing
        late = [p for p in given if p.kind is p.POSITIONAL_OR_KEYWORD and p not in first]
        by_name = {p.name: values.pop(p.name) for p in given if p.kind is p.KEYWORD_ONLY or p in late}

        def forward(_root: nn.Module, *args: Any) -> Any:
            return function(*args, **by_name)

        return forward, [self.root, *values.values()]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follow a module, or make a node of it. Raises TypeError for arguments that it does not take, as calling it would: a
        forward may catch that."""
        if m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        with contextlib.suppress(ValueError):  # TorchScript has no signature
            inspect.signature(m.forward).bind(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


class _BufferProxy(WritableProxy, ParameterProxy):
    """A buffer whose shape is known."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, buffer: Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)  # ParameterProxy's own takes parameters only
        self.param: Tensor = buffer  # type: ignore[assignment]
        self.name = name


class _OwnForward(_PartsTracer):
    """Follows one forward and enters no other. ``buffers``: what it does with buffers becomes nodes too, and is not run."""

    def __init__(self, buffers: bool) -> None:
        super().__init__(param_shapes_constant=True)
        self._buffers = buffers

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute that a forward asks for: a node of the graph where it is a parameter or a buffer."""
        buffers = self.root.named_buffers() if self._buffers and isinstance(attr_val, Tensor) else ()
        name = next((name for name, buffer in buffers if buffer is attr_val), None)
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr", name, (), {}, proxy_factory_fn=lambda node: _BufferProxy(self, node, name, attr_val)
            )
        return parameter_proxy_cache[name]

    def is_leaf_module(self, _module: nn.Module, _name: str) -> bool:
        return True


class OpaqueTracer(_PartsTracer):
    """Remembers the innermost module in which following failed, and treats those already known to fail as leaves."""

    def __init__(self, opaque: frozenset[str]) -> None:
        super().__init__(autowrap_functions=_foreign_functions())
        self.opaque = opaque
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        opaque = isinstance(m, Operator) or _is_own_layer(m) or module_qualified_name in self.opaque
        return opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follow a module, or make a node of it; what following it raises is passed on."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and m in (self.submodule_paths or {}):
                self.failed = self.path_of_module(m)
            raise


def _foreign_functions() -> tuple[Callable[..., Any], ...]:
    """Functions of einops, where a model has imported it: they ask what kind of tensor they are given, and refuse what a tracer
    passes through. Each call of one is a node."""
    einops = sys.modules.get("einops")
    found = (getattr(einops, name, None) for name in FUNCTIONS_OF_EINOPS)
    return tuple(function for function in found if callable(function))


MakeTracer = Callable[[frozenset[str]], OpaqueTracer]


def execute(node: fx.Node, modules: dict[str, nn.Module], values: Mapping[fx.Node, Any]) -> Any:
    """The value of one node of a graph, given those before it; ``modules`` by their names, the root's being ``""``."""
    args = fx.map_arg(node.args, lambda n: values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
    with torch.no_grad():
        if node.op == "call_module":
            return modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(modules[""])
        assert callable(node.target)
        return node.target(*args, **kwargs)


def given_to(node: fx.Node, inputs: Iterator[Tensor]) -> Any:
    """What a placeholder stands for: a copy of the next input, or for ``*args`` of all that are left. The network may change
    it."""
    if str(node.target).startswith("**"):
        return {}
    if str(node.target).startswith("*"):
        return tuple(tensor.clone() for tensor in inputs)
    return next(inputs).clone()


def _is_container(value: Any) -> bool:
    """Whether fx takes a value apart: a tuple, a list, a dictionary, and whatever else torch knows as one."""
    leaves = tree_leaves(value)
    return len(leaves) != 1 or leaves[0] is not value


def _drop_defaults(graph: fx.Graph, module: nn.Module) -> None:
    """Remove the placeholders of concrete arguments, to whose names tracing adds numbers, and the assertions it put on them."""
    names = inspect.signature(module.forward).parameters
    for node in list(graph.nodes):
        if node.op == "call_function" and node.name.startswith("_assert"):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        compares = node.op == "call_function" and node.target.__name__ in ("eq", "is_")
        stands_in = node.op == "placeholder" and node.target.lstrip("*") not in names
        if (compares or stands_in) and not node.users:
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(part, _ConvNd) or _is_own_layer(part) for part in module.modules())


def _is_own_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("convrewrite.layers")


def _has_forward(module: nn.Module) -> bool:
    """Whether it can be called: a ModuleList cannot, and only its modules can be followed."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _may_be_followed(module: nn.Module) -> bool:
    """Whether it has submodules that a graph of it could show; TorchScript stays as it is, and has no Python to follow."""
    return next(module.children(), None) is not None and not isinstance(module, torch.jit.ScriptModule)


def joined(first: str, second: str) -> str:
    """The name of a part within a part; the model itself has none, on either side."""
    return f"{first}.{second}" if first and second else first or second


def module_calls(graphs: Mapping[str, fx.GraphModule]) -> Iterator[tuple[str, fx.Node]]:
    """Every ``call_module`` node of the graphs of parts, with the module's name in the whole model."""
    for part, graph_module in graphs.items():
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                yield qualified(part, node.target), node
