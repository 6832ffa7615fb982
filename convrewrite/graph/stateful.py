"""What a graph does not show: what nodes, or runs, hand on beside its edges, through attributes, closures and written memory.

Where nothing is handed on, the nodes may run in any order of batches, and in two networks in turn. A hook, a forward of a class
that is not torch's and a function of anybody's may keep anything, so these count as if they did.
"""

import operator
from dataclasses import is_dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from convrewrite.graph.in_place import KNOWN_LAYERS, may_change, tensors_in, written_arguments
from convrewrite.graph.tracing import given_to
from convrewrite.inputs import Inputs
from convrewrite.state import address_of, parameters_of

HOOKS = "torch."
"""The package whose hooks keep nothing: those of weight_norm, spectral_norm and pruning make a weight."""

PACKAGES = ("torch", "torchvision", "einops", "convrewrite", "math", "operator", "_operator", "builtins")
"""Packages whose functions compute from their arguments alone, and say by their names whether they write to these."""

OPERATORS = "torch._ops.aten"
"""Where torch's own operators say that they are of; those of others may write, and keep, anything if they write at all."""

FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, type)
"""What tells which package it is of; a function of TorchScript says that it is torch's."""


def keeps_state(graph: fx.GraphModule) -> bool:
    """Whether something that the graph calls may hand on more than its output."""
    modules = dict(graph.named_modules(remove_duplicate=False))
    return not all(_is_plain(node, modules) for node in graph.graph.nodes)


def _is_plain(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return all(map(_is_plain_layer, modules[str(node.target)].modules()))
    return node.op != "call_function" or _is_plain_function(node.target)


def _is_plain_layer(module: nn.Module) -> bool:
    if not type(module).__module__.startswith(KNOWN_LAYERS) or "forward" in vars(module):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return all(str(getattr(hook, "__module__", "")).startswith(HOOKS) for hook in hooks)


def _is_plain_function(function: Any) -> bool:
    if isinstance(function, OpOverload | OpOverloadPacket):
        return function.__module__ == OPERATORS or not written_arguments(function)
    if isinstance(function, type) and (
        issubclass(function, tuple) or is_dataclass(function)
    ):  # what outputs are put in
        return True
    owner = getattr(function, "__objclass__", function)
    return isinstance(function, FUNCTIONS) and str(owner.__module__).partition(".")[0] in PACKAGES


def writes_unforeseen(graph: fx.GraphModule, inputs: Inputs) -> bool:
    """Whether a run writes to tensors of the model, or to others than :func:`may_change` says: torch counts the writes to every
    tensor."""
    watch = _Watch(graph)
    own = [*parameters_of(graph), *graph.buffers(), *_constants(graph)]
    before = [_version(tensor) for tensor in own]
    with torch.no_grad():
        watch.run(*inputs)
    return watch.surprised or [_version(tensor) for tensor in own] != before


class _Watch(fx.Interpreter):
    """Runs a graph node by node. ``surprised``: whether one has written to what it was not known to change."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.surprised = False
        self._modules = dict(graph.named_modules(remove_duplicate=False))

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return given_to(node, self.args_iter)
        foreseen = {
            address_of(tensor) for source in may_change(node, self._modules) for tensor in tensors_in(self.env[source])
        }
        others = [
            t for source in node.all_input_nodes for t in tensors_in(self.env[source]) if address_of(t) not in foreseen
        ]
        before = [_version(tensor) for tensor in others]
        value = super().run_node(node)
        self.surprised |= [_version(tensor) for tensor in others] != before
        return value


def _constants(graph: fx.GraphModule) -> list[Tensor]:
    """What the graph takes from the model by name."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    return tensors_in([operator.attrgetter(name)(graph) for name in names])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # torch counts for all others
