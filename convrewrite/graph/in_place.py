"""Which memory nodes of a graph write to: work in place, and functions that are told where to put what they give."""

import operator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.graph import inplace_methods

MAKE_THEIR_OWN = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d)
"""Layers whose output is never a view of their input, unless they work in place."""

KNOWN_LAYERS = ("torch.nn.", "convrewrite.")
"""Packages whose layers say whether they work in place, and compute in eval mode from their inputs and weights alone."""

IN_PLACE = tuple(getattr(operator, name) for name in inplace_methods)
"""Functions of Python that write to their first argument: ``x += y``, ``x[0] = y``."""


def may_change(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The nodes whose values a node may write to: all its inputs, where it is a module of an unknown package."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not type(module).__module__.startswith(KNOWN_LAYERS):
            return node.all_input_nodes
        return node.all_input_nodes[:1] if bool(getattr(module, "inplace", False)) else []
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        return _written_by_operator(node)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or node.target in IN_PLACE or bool(node.kwargs.get("inplace"))
    return [*(node.all_input_nodes[:1] if in_place else []), *_written_out(node)]


def _written_by_operator(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an operator writes to, as its schema says."""
    found: list[fx.Node] = []
    for place, name in written_arguments(node.target):
        given = node.args[place] if place is not None and place < len(node.args) else node.kwargs.get(name)
        fx.node.map_arg(given, found.append)
    return found


@cache
def written_arguments(called: Any) -> tuple[tuple[int | None, str], ...]:
    """The place, if it has one, and the name of every argument that an operator writes to, or any overload of it."""
    schemas = (
        [called._schema]
        if isinstance(called, OpOverload)
        else [getattr(called, overload)._schema for overload in called.overloads()]
    )
    return tuple(
        (None if argument.kwarg_only else place, argument.name)
        for schema in schemas
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _written_out(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a function is told to write to: ``out=``."""
    found: list[fx.Node] = []
    if node.op == "call_function":
        fx.node.map_arg(node.kwargs.get("out"), found.append)
    return found


def memory_of(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """The node that made the memory in which ``node`` may lie, going back through work in place and all that may return a
    view."""
    while node.all_input_nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        makes_its_own = type(module) in MAKE_THEIR_OWN or node.target in (operator.add, torch.add)
        if makes_its_own and not may_change(node, modules):
            return node
        node = next(iter(_written_out(node)), node.all_input_nodes[0])
    return node


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, which may be a tuple, a list or a dictionary of others."""
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda part: found.append(part) if isinstance(part, Tensor) else None)
    return found
