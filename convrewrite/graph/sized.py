"""Following a forward that asks how large its input is: ``if x.shape[2] % 2``, ``for part in x.split(4)``, ``range(len(x))``.

A tracer cannot answer, since it passes no numbers through. This one can: it computes shapes beside the graph, with tensors
that have no numbers, so that an answer which hangs on numbers still fails. The graph is one for these sizes of inputs.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import Attribute

from convrewrite.graph.tracing import OpaqueTracer, Traced, execute, given_to, trace
from convrewrite.inputs import Inputs


def trace_sized(model: torch.nn.Module, inputs: Inputs) -> Traced:
    """:func:`convrewrite.graph.tracing.trace`, the whole model being followed for inputs of these sizes."""
    return trace(model, len(inputs), lambda opaque: _SizedTracer(opaque, inputs))


class _SizedTracer(OpaqueTracer):
    """Knows the shape of every value so far, once it is asked for one."""

    def __init__(self, opaque: frozenset[str], inputs: Inputs) -> None:
        super().__init__(opaque)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._inputs = iter([self._mode.from_tensor(tensor) for tensor in inputs])
        self._values: dict[fx.Node, Any] = {}
        self._computing = False

    def value(self, proxy: fx.Proxy) -> Any:
        """What a proxy stands for. Raises what computing it raises, where it hangs on the numbers in a tensor.

        Modules and their parameters are themselves meanwhile, and not followed.
        """
        wanted = proxy.node  # which an attribute makes when it is asked for it
        modules = dict(self.root.named_modules(remove_duplicate=False))
        self._computing = True
        try:
            with self._mode, torch.no_grad():
                for node in list(self.graph.nodes):  # in their order: some of them may work in place
                    if node not in self._values:
                        self._values[node] = self._computed(node, modules)
        finally:
            self._computing = False
        return self._values[wanted]

    def _computed(self, node: fx.Node, modules: dict[str, torch.nn.Module]) -> Any:
        if node.op != "placeholder":
            return execute(node, modules, self._values)
        return node.args[0] if node.args else given_to(node, self._inputs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.value(obj))

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[index] for index in range(self.length(obj))])

    def keys(self, obj: Any) -> Any:
        """Of a dictionary, as ``**kwargs`` are where they are passed on."""
        value = self.value(obj)
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__} has no keys that a graph could list")
        return value.keys()

    def length(self, obj: fx.Proxy) -> int:
        """Of a tuple, a list, or the first axis of a tensor."""
        value = self.value(obj)
        if not isinstance(value, torch.Tensor | tuple | list):
            raise TypeError(f"a {type(value).__name__} has no items that a graph could count")
        return len(value)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: torch.nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)


class _Sized(fx.Proxy):
    """Answers what Python asks a value for, and cannot be told by a node of a graph."""

    tracer: _SizedTracer

    def __getattr__(self, name: str) -> Any:
        return _SizedAttribute(self, name)

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __index__(self) -> int:
        return operator.index(self.tracer.value(self))

    def __int__(self) -> int:
        return int(self.tracer.value(self))

    def __float__(self) -> float:
        return float(self.tracer.value(self))


class _SizedAttribute(_Sized, Attribute):
    """As ``x.shape``, and as ``x.size`` before it is called."""
