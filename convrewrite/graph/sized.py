"""Following a forward that asks how large its input is: ``if x.shape[2] % 2``, ``for part in x.split(4)``, ``range(len(x))``.

A tracer cannot answer, since it passes no numbers through. This one can: it computes shapes beside the graph, with tensors
that have no numbers, so a question whose answer depends on numbers still fails. The graph holds for these sizes of inputs.
"""

import operator
from collections.abc import Iterator
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import Attribute

from convrewrite.graph.arguments import names_given
from convrewrite.graph.tracing import OpaqueTracer, Traced, WritableProxy, execute, given_to, trace
from convrewrite.inputs import Inputs

OF_ARRAYS = "__array_"
"""How the names of attributes begin that numpy looks for in arrays of others; ``__array__`` gives it a whole array."""


def trace_sized(model: torch.nn.Module, inputs: Inputs) -> Traced:
    """:func:`convrewrite.graph.tracing.trace`, the whole model being followed for inputs of these sizes."""
    return trace(model, len(inputs), lambda opaque: _SizedTracer(opaque, inputs))


class _SizedTracer(OpaqueTracer):
    """When it is asked for a shape, it computes those of all values so far."""

    def __init__(self, opaque: frozenset[str], inputs: Inputs) -> None:
        super().__init__(opaque)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._inputs = iter([self._mode.from_tensor(tensor) for tensor in inputs])
        self._count = len(inputs)
        self._values: dict[fx.Node, Any] = {}
        self._failed: Exception | None = None
        self._computing = False

    def value(self, proxy: fx.Proxy) -> Any:
        """What a proxy stands for. If it depends on the numbers in a tensor, the error of computing it is passed on.

        Meanwhile modules are run and parameters used as they are, without being followed.
        """
        wanted = proxy.node  # the proxy of an attribute makes its node only now
        if self._failed is not None:
            raise self._failed
        self._computing = True
        try:
            with self._mode, torch.no_grad():
                for node in reversed(list(takewhile(lambda n: n not in self._values, reversed(self.graph.nodes)))):
                    self._values[node] = self._computed(node)  # in their order: some of them may work in place
        except Exception as error:
            self._failed = error
            raise
        finally:
            self._computing = False
        return self._values[wanted]

    @cached_property
    def _modules(self) -> dict[str, torch.nn.Module]:
        return dict(self.root.named_modules(remove_duplicate=False))

    @cached_property
    def _given(self) -> list[str]:
        """The arguments of the forward that the inputs are given to, though they may have defaults."""
        return names_given(self.root, self._count)

    def _computed(self, node: fx.Node) -> Any:
        if node.op != "placeholder":
            return execute(node, self._modules, self._values)
        if node.args and str(node.target) not in self._given:
            return node.args[0]
        return given_to(node, self._inputs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.value(obj))

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[index] for index in range(self.length(obj))])

    def keys(self, obj: Any) -> Any:
        """Those of a dictionary, such as ``**kwargs`` that are passed on."""
        value = self.value(obj)
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__} has no keys that a graph could list")
        return value.keys()

    def length(self, obj: fx.Proxy) -> int:
        """That of a tuple, a list, or the first axis of a tensor."""
        value = self.value(obj)
        if not isinstance(value, torch.Tensor | tuple | list):
            raise TypeError(f"a {type(value).__name__} has no items that a graph could count")
        return len(value)

    def known(self, obj: fx.Proxy) -> Any:
        """What a proxy stands for; None where computing it fails, as it does where it depends on the numbers in a tensor."""
        try:
            return self.value(obj)
        except Exception:  # an operator may fail in any way without numbers
            return None

    def class_of(self, obj: fx.Proxy) -> type:
        """The class of what a proxy stands for, torch's own for a tensor without numbers; NoneType where computing it fails."""
        value = self.known(obj)
        return torch.Tensor if isinstance(value, torch.Tensor) else type(value)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: torch.nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)


class _Sized(WritableProxy):
    """Answers questions of Python that need a real value, which a node of a graph cannot give."""

    tracer: _SizedTracer

    def __getattr__(self, name: str) -> Any:
        found = self.tracer.known(self)
        if name.startswith(OF_ARRAYS) or not (found is None or hasattr(found, name)):
            raise AttributeError(f"{type(found).__name__} has no attribute {name}")
        value = getattr(found, name, None)
        if isinstance(value, str | torch.dtype):  # torch.autocast(x.device.type) and torch.finfo(x.dtype) take no node
            return value
        return _SizedAttribute(self, name)

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __index__(self) -> int:
        return operator.index(self.tracer.value(self))

    def __int__(self) -> int:
        return int(self.tracer.value(self))

    def __float__(self) -> float:
        return float(self.tracer.value(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Sizes, for functions of numpy."""
        return np.array(self.tracer.value(self), dtype)

    def __str__(self) -> str:
        return str(self.tracer.value(self))

    def __format__(self, spec: str) -> str:
        return format(self.tracer.value(self), spec)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.value(self), digits)


class _SizedAttribute(_Sized, Attribute):
    """An attribute such as ``x.shape``, or a method such as ``x.size`` before it is called."""
