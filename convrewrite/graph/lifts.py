"""What is lifted: functional convolutions as values, and the surgery that puts modules in their places.

In a copy of the model the module whose forward calls ``F.conv2d(x, self.weight)`` becomes a GraphModule in which the call is
a ``nn.Conv2d`` or ``nn.ConvTranspose2d`` that holds the parameter. All other modules keep their class, and all other tensors
their state-dict keys. A forward that is nothing but the call becomes the convolution itself.
"""

import inspect
import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from convrewrite.conv import Conv, ConvSpec
from convrewrite.errors import PlanError
from convrewrite.escaping import one_line
from convrewrite.graph.calls import ARGUMENTS, geometry_of_call, named_arguments
from convrewrite.graph.fixed_kernels import fixed_convolution
from convrewrite.graph.tracing import follow_forward, qualified
from convrewrite.modules import copy_model, replace_modules
from convrewrite.state import named_parameters_of

LARGEST_TRIAL = 1 << 26
"""Most numbers in the input on which a module that computes its kernel is tried."""

SHAPE_READERS = ("getattr", "getitem", "size")
"""Functions and methods that say how many groups there are; once the call is gone, nothing needs them."""


@dataclass(frozen=True, slots=True)
class LiftedConv:
    """One convolution: the names of its tensors in the module whose forward calls it, and the name of the new submodule in that
    module; ``""`` when the module itself becomes the convolution. ``computed``: the module computes its kernel at every call,
    though not from the input."""

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

    Everything in a lift is checked, as it may come from a file. All constants and buffers of the forwards that are now graphs
    are in the state dict, as they are in copies of graph modules.
    """
    lifted = copy_model(model)
    _require_lifts(lifted, lifts)
    for one in lifts:
        try:
            part = lifted.get_submodule(one.module)
            _require_convs(part, one)
            made = _lifted_part(part, one)
        except Exception as error:  # following a forward of another model may fail in any way
            raise PlanError(
                f"{one.module or type(model).__name__}: expected a forward that calls {one.convs[0].weight} as a "
                f"convolution, found none ({one_line(error)}); give the original model the plan was made from"
            ) from error
        if part is lifted:
            lifted = made
        else:
            replace_modules(lifted, {id(part): made})
    return copy_model(lifted)


def _require_lifts(model: nn.Module, lifts: Sequence[Lift]) -> None:
    """Raise PlanError unless each is of another module of the model, and has convolutions."""
    known, seen = {name for name, _ in model.named_modules()}, set()
    for one in lifts:
        if not one.convs:
            raise PlanError(f"lifted {one.module!r}: expected convolutions, found none; make a new plan")
        if one.module not in known or one.module in seen:
            what = "twice" if one.module in seen else "no such module"
            raise PlanError(
                f"lifted {one.module!r}: expected a forward that calls {one.convs[0].weight} as a convolution, found none "
                f"({what}); give the original model the plan was made from"
            )
        seen.add(one.module)


def _require_convs(part: nn.Module, lift: Lift) -> None:
    """Raise ValueError for tensors or arguments that a module does not have, or names that lifting would not give."""
    tensors = {name for name, _ in (*named_parameters_of(part), *part.named_buffers())}
    computed = any(conv.computed for conv in lift.convs)  # its one argument may have any name
    unknown = set() if computed else set(lift.arguments) - set(inspect.signature(part.forward).parameters)
    taken: set[str] = set()
    for conv in lift.convs:
        if conv.computed:
            fits = lift == Lift(lift.module, ("input",), (LiftedConv("weight", conv.bias, "", conv.spec, True),))
            fits = fits and conv.bias == ("bias" if conv.spec.bias else None)
        else:
            unknown |= {name for name in (conv.weight, conv.bias) if name is not None} - tensors
            fits = not unknown and _may_be_called(part, conv, len(lift.convs)) and conv.name not in taken
        if unknown:
            raise ValueError(f"it has no {', '.join(sorted(unknown))}")
        if not fits or (conv.name == "" and len(lift.convs) > 1):
            raise ValueError(f"the convolution with {conv.weight} is not called {conv.name!r}")
        taken.add(conv.name)


def _may_be_called(part: nn.Module, conv: LiftedConv, count: int) -> bool:
    """Whether lifting may give this name, a longer one too: a convolution that stays a function may have had the shorter one."""
    known = possible_names(part, conv.weight, conv.bias, ())
    longer = {known[-1] + "_conv" * number for number in range(1, count + 1)}
    return conv.name in known or (conv.name in longer and not _has(part, conv.name))


def possible_names(part: nn.Module, weight: str, bias: str | None, taken: Collection[str]) -> tuple[str, ...]:
    """Where the convolution with these tensors of a module can be put, the best place first: in place of the module itself
    (``""``), of the submodule that only holds the tensors, or of the weight."""
    own = {name for name in ("weight", "bias") if name == "weight" or bias is not None}
    path, _, last = weight.rpartition(".")
    holder = part.get_submodule(path)
    names = [""] if _holds_only(part, own) else []
    if (
        path
        and last == "weight"
        and bias == (f"{path}.bias" if bias is not None else None)
        and _holds_only(holder, own)
    ):
        names.append(path)
    if not isinstance(holder, nn.ParameterList | nn.ParameterDict):
        return (*names, weight)
    name = f"{path}_{last}"
    while name in taken or _has(part, name):
        name += "_conv"
    return (*names, name)


def _has(module: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return hasattr(module.get_submodule(path), last)


def _holds_only(module: nn.Module, names: set[str]) -> bool:
    held = {name for name, tensor in (module._parameters | module._buffers).items() if tensor is not None}
    return not module._modules and held == names


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
    """What one module becomes. Its submodules and remaining tensors are moved over, so the old module is of no use afterwards."""
    if lift.convs[0].computed:
        _require_trial(lift.convs[0].spec)
        return fixed_convolution(part, lift.convs[0].spec)
    convs = {conv.weight: conv for conv in lift.convs}
    made = follow_forward(part, lift.arguments)
    nodes = [node for node in calls_in(made.graph) if tensor_name(node, "weight") in convs]
    missing = set(convs) - {tensor_name(node, "weight") for node in nodes}
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} is not called")
    for node in nodes:
        _require_geometry(part, node, convs[str(tensor_name(node, "weight"))])
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


def _require_trial(spec: ConvSpec) -> None:
    """Raise ValueError for a geometry that is not tried out, as its smallest input would be of absurd size."""
    height, width = spec.extents
    if min(spec.in_channels, height, width) < 1 or spec.in_channels * height * width > LARGEST_TRIAL:
        raise ValueError("its geometry is none that can be tried out")


def _require_geometry(part: nn.Module, node: fx.Node, conv: LiftedConv) -> None:
    """Raise ValueError unless a call has this very geometry. The forward may compute the number of groups."""
    named = arguments_of(node)
    if (tensor_name(node, "bias") or None) != conv.bias:
        raise ValueError(f"{conv.weight} is called with another bias")
    if isinstance(named.get("groups"), fx.Node):
        named["groups"] = conv.spec.groups
    found = geometry_of_call(named | {"weight": operator.attrgetter(conv.weight)(part)})
    if found != conv.spec:
        raise ValueError(f"{conv.weight} is called in another geometry")


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
    """Remove a call, and the nodes before it that only looked up its arguments."""
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
    """Give a graph module all submodules and tensors of the module it replaces, even those that its graph does not use."""
    for table in (made._parameters, made._buffers, made._modules):
        table.clear()
    for name, parameter in part._parameters.items():
        made.register_parameter(name, parameter)
    for name, buffer in (part._buffers | constants).items():
        made.register_buffer(name, buffer, persistent=name not in part._non_persistent_buffers_set)
    for name, module in part._modules.items():
        made.add_module(name, module)
