"""torch.fx graphs of any module: whole where that works, otherwise part by part.

A graph gives what running a model cannot: which module's output goes where, and into nothing else. Rewriting does not need
it (submodules are replaced through their parents), so a model without a graph loses only what is said in ``lost``.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from convrewrite.errors import TraceError


@dataclass(frozen=True, slots=True)
class Traced:
    """The graphs of a model: one under the name ``""`` when it could be followed whole, else those of its parts."""

    parts: dict[str, fx.GraphModule]
    lost: tuple[str, ...]

    @property
    def whole(self) -> fx.GraphModule | None:
        """The graph of the whole model, every convolution a node of it; None when it could not be followed whole."""
        return self.parts.get("") if not self.lost else None


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The model's output without gradients. Raises TraceError that names the input shapes when the model cannot run."""
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
    try:
        with torch.no_grad():
            return model(*(tensor.clone() for tensor in inputs))  # it may work on them in place
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(
            f"{type(model).__name__}: the model does not run on input {shapes}: {reason}; "
            "give the shape it expects (--input, or example_input in Python)"
        ) from error


def trace(model: nn.Module, inputs: int = 1) -> Traced:
    """Follow ``model`` whole if possible; otherwise leave out the innermost modules that fail and follow those inside.

    The first ``inputs`` arguments of its ``forward`` are given; optional ones behind them take their defaults.
    """
    parts: dict[str, fx.GraphModule] = {}
    lost: list[str] = []
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop(0)
        graph, opaque = _follow(module, 1 if name else inputs)
        if graph is not None:
            parts[name] = graph
        for inner in opaque:
            path = _join(name, inner)
            lost.append(path)
            child = module.get_submodule(inner)
            waiting += [(_join(path, key), sub) for key, sub in child.named_children() if _has_children(sub)]
    return Traced(parts, tuple(lost))


def qualified(part: str, target: object) -> str:
    """The name in the whole model of what a part's graph calls ``target``."""
    return _join(part, str(target))


def _follow(module: nn.Module, given: int) -> tuple[fx.GraphModule | None, list[str]]:
    """A graph of ``module`` and the names of the submodules that had to be left opaque in it (``""``: itself)."""
    opaque: list[str] = []
    names = list(inspect.signature(module.forward).parameters)[:given]
    while True:
        tracer = _Tracer(frozenset(opaque))
        try:
            with _unchanged(module):
                graph = tracer.trace(module, concrete_args=_defaults(module, names))
                _drop_defaults(graph, module)
                return fx.GraphModule(module, graph), opaque
        except Exception:  # a forward may fail in any way while it is being followed
            failed = tracer.failed or ""
            if failed == "" or failed in opaque:
                return None, [""]
            opaque.append(failed)


def follow_forward(module: nn.Module, given: Collection[str]) -> fx.GraphModule:
    """The graph of this module's own forward, its submodules being single nodes of it.

    The parameters of the forward that are not ``given`` take their defaults. What following it raises is passed on; the
    module itself stays as it is.
    """
    with _unchanged(module):
        traced = _OwnForward(param_shapes_constant=True).trace(module, concrete_args=_defaults(module, given))
        _drop_defaults(traced, module)
        graph = fx.Graph()  # a copy does not know the tracer, which a pickle would name
        graph.output(graph.graph_copy(traced, {}))
        return fx.GraphModule(module, graph, type(module).__name__)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Following a forward leaves the tensors it makes on the module, as attributes: they are taken away again."""
    before = set(vars(module))
    try:
        yield
    finally:
        for name in set(vars(module)) - before:
            delattr(module, name)


class _OwnForward(fx.Tracer):
    """Follows one forward and enters no other."""

    def is_leaf_module(self, _module: nn.Module, _name: str) -> bool:
        return True


class _Tracer(fx.Tracer):
    """Remembers the innermost module in which following failed, and takes those already known as leaves."""

    def __init__(self, opaque: frozenset[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own_layer = type(m).__module__.startswith("convrewrite.layers")
        return own_layer or module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


def _defaults(module: nn.Module, given: Collection[str]) -> dict[str, Any]:
    """The arguments that are not ``given``, with their defaults: as Proxies they would bake ``if x is None`` to False."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in given and p.default is not p.empty}


def _drop_defaults(graph: fx.Graph, module: nn.Module) -> None:
    """Remove the placeholders of concrete arguments, which tracing numbers, and the assertions it put on them."""
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


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _join(first: str, second: str) -> str:
    return f"{first}.{second}" if first and second else first or second


def module_calls(traced: Traced) -> Iterator[tuple[str, fx.Node]]:
    """Every ``call_module`` node of every part, with the module's name in the whole model."""
    for part, graph_module in traced.parts.items():
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                yield qualified(part, node.target), node
