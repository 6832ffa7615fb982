"""What is lifted: functional convolutions as values, and the surgery that puts modules in their places.

In a copy of the model the module whose forward calls ``F.conv2d(x, self.weight)`` becomes a GraphModule in which the call is
a ``nn.Conv2d`` or ``nn.ConvTranspose2d`` that holds the parameter. All other modules keep their class, and all other tensors
their state-dict keys. A forward that is nothing but the call becomes the convolution itself.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from convrewrite.conv import Conv, ConvSpec
from convrewrite.copying import copy_model
from convrewrite.errors import PlanError
from convrewrite.fixed_kernels import fixed_convolution
from convrewrite.functional_calls import ARGUMENTS, named_arguments
from convrewrite.modules import replace_modules
from convrewrite.tracing import follow_forward, qualified

SHAPE_READERS = ("getattr", "getitem", "size")
"""Functions and methods that say how many groups there are; without the call nobody needs them."""


@dataclass(frozen=True, slots=True)
class LiftedConv:
    """One convolution: the names of its tensors in the module whose forward calls it, and there that of the new submodule;
    ``""`` when the module itself becomes the convolution. ``computed``: its kernel is one that the module computes at every
    call, though not from the input."""

    weight: str
    bias: str | None
    name: str
    spec: ConvSpec
    computed: bool = False


@dataclass(frozen=True, slots=True)
class Lift:
    """One module whose forward calls convolutions as functions, and the parameters of that forward which callers give."""

    module: str
    arguments: tuple[str, ...]
    convs: tuple[LiftedConv, ...]


def apply_lifts(model: nn.Module, lifts: Sequence[Lift]) -> nn.Module:
    """A copy of the model with these convolutions as modules. Raises PlanError when it has no such calls.

    Constants of the forwards that are graphs now, and their buffers, all stand in the state dict, as copies of graph modules
    have it.
    """
    lifted = copy_model(model)
    for one in lifts:
        try:
            part = lifted.get_submodule(one.module)
            made = _lifted_part(part, one)
        except Exception as error:  # following a forward of another model may fail in any way
            raise PlanError(
                f"{one.module or type(model).__name__}: expected a forward that calls {one.convs[0].weight} as a "
                f"convolution, found none ({error}); give the original model the plan was made from"
            ) from error
        if part is lifted:
            lifted = made
        else:
            replace_modules(lifted, {id(part): made})
    return copy_model(lifted)


def changed_keys(lift: Lift, conv: LiftedConv) -> list[tuple[str, str]]:
    """(old, new) names of a convolution's tensors where they differ."""
    site = qualified(lift.module, conv.name)
    pairs = [(conv.weight, "weight"), *([(conv.bias, "bias")] if conv.bias is not None else [])]
    moved = [(qualified(lift.module, key), qualified(site, name)) for key, name in pairs]
    return [(old, new) for old, new in moved if old != new]


def calls_in(graph: fx.Graph) -> Iterator[fx.Node]:
    """The functional convolutions of a graph."""
    return (node for node in graph.nodes if node.op == "call_function" and node.target in ARGUMENTS)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional convolution, by name."""
    return named_arguments(node.target, node.args, node.kwargs)


def tensor_name(node: fx.Node, argument: str) -> str | None:
    """The name of the tensor that is given as an argument of a functional convolution; None when it is computed."""
    value = arguments_of(node).get(argument) if node.op == "call_function" and node.target in ARGUMENTS else None
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _lifted_part(part: nn.Module, lift: Lift) -> nn.Module:
    """What one module becomes. Its submodules and the tensors that are left are moved over, so it is of no use after."""
    if lift.convs[0].computed:
        return fixed_convolution(part, lift.convs[0].spec)
    convs = {conv.weight: conv for conv in lift.convs}
    made = follow_forward(part, lift.arguments)
    nodes = [node for node in calls_in(made.graph) if tensor_name(node, "weight") in convs]
    missing = set(convs) - {tensor_name(node, "weight") for node in nodes}
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} is not called")
    built = {conv.name: _build(part, conv) for conv in lift.convs}
    if "" in built:
        return built[""]
    constants = {name: tensor for name, tensor in made._buffers.items() if name not in part._buffers}
    for conv in lift.convs:
        for key in (conv.weight, conv.bias):
            if key is not None:
                _take_out(part, key)
        holder, _, name = conv.name.rpartition(".")
        setattr(part.get_submodule(holder), name, built[conv.name])
    _take_over(made, part, constants)
    for node in nodes:
        with made.graph.inserting_before(node):
            call = made.graph.call_module(convs[str(tensor_name(node, "weight"))].name, (arguments_of(node)["input"],))
        node.replace_all_uses_with(call)
        _erase(made.graph, node)
    made.recompile()
    return made


def _build(part: nn.Module, conv: LiftedConv) -> Conv:
    """The module, with the very tensors of the functional call."""
    module = conv.spec.build(device="meta")
    for name, key in (("weight", conv.weight), ("bias", conv.bias)):
        if key is None:
            continue
        tensor = operator.attrgetter(key)(part)
        expected = tuple(getattr(module, name).shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{key} has the shape {tuple(tensor.shape)} instead of {expected}")
        own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        setattr(module, name, own)
    module.train(part.training)
    return module


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a call, and in front of it what only looked up its arguments."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        name = source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
        if not source.users and (source.op == "get_attr" or name in SHAPE_READERS):
            _erase(graph, source)


def _take_out(part: nn.Module, key: str) -> None:
    """Remove a parameter or buffer. A list or dictionary of parameters that lacks one becomes a plain module."""
    path, _, name = key.rpartition(".")
    holder = part.get_submodule(path)
    delattr(holder, name)
    if isinstance(holder, nn.ParameterList | nn.ParameterDict):
        plain = nn.Module().train(holder.training)
        for other, parameter in holder._parameters.items():
            plain.register_parameter(other, parameter)
        above, _, last = path.rpartition(".")
        setattr(part.get_submodule(above), last, plain)


def _take_over(made: fx.GraphModule, part: nn.Module, constants: dict[str, Tensor | None]) -> None:
    """Give a graph module all submodules and tensors of the module it replaces, those its graph does not use too."""
    for table in (made._parameters, made._buffers, made._modules):
        table.clear()
    for name, parameter in part._parameters.items():
        made.register_parameter(name, parameter)
    for name, buffer in (part._buffers | constants).items():
        made.register_buffer(name, buffer, persistent=name not in part._non_persistent_buffers_set)
    for name, module in part._modules.items():
        made.add_module(name, module)
