"""Exported programs -> modules that can be rewritten and trained.

What ``ExportedProgram.module()`` gives calls ``aten`` operators on bare tensors, cannot change its mode, and refuses other
batch sizes than it was exported with. Here its graph gets real layers, under the names they had in the model it was
exported from, and an open batch axis where that is certain (:mod:`convrewrite.loading.batch_axis`).
"""

import inspect
import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from convrewrite.errors import ConvRewriteError, ModelLoadError
from convrewrite.escaping import summary
from convrewrite.graph import lift
from convrewrite.inputs import Inputs
from convrewrite.loading.batch_axis import fixed_batch, open_batch
from convrewrite.loading.input_shapes import SHAPES
from convrewrite.state import named_parameters_of

_aten = torch.ops.aten

_NORMS: dict[Any, tuple[int | None, int, int]] = {
    _aten.batch_norm.default: (5, 6, 7),
    _aten._native_batch_norm_legit_no_training.default: (None, 5, 6),
}
"""Operators that normalise -> the positions of their arguments training, momentum and eps."""

_NORM_TYPES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""Types of BatchNorm by the number of axes of the input."""

_DROPOUTS: dict[Any, type[nn.Dropout | nn.Dropout2d]] = {
    _aten.dropout.default: nn.Dropout,
    _aten.feature_dropout.default: nn.Dropout2d,
}

_PLAIN: dict[Any, tuple[int, Any]] = {
    _aten.relu.default: (1, torch.relu),
    _aten.relu_.default: (1, torch.relu_),
    _aten.add.Tensor: (2, operator.add),
    _aten.add_.Tensor: (2, operator.iadd),
}
"""Operators -> how many arguments they have, and the functions by which other stages know them."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The module, in the mode the program was exported in, and what was done to it, a sentence each."""

    model: fx.GraphModule
    notes: tuple[str, ...]


def rebuild(program: ExportedProgram, source: str = "program") -> Rebuilt:
    """A module that computes what the program computes, for any batch size; it trains, and switches between its modes.

    It takes the program's tensors by position; those that stood in containers, in the order in which they stood there.
    Raises ModelLoadError, naming ``source``, for a program that takes no other batch size than it was exported with.
    """
    try:
        return _rebuild(program, source)
    except ConvRewriteError:
        raise
    except Exception as error:  # a program may hold any operator
        raise ModelLoadError(
            f"{source}: expected a program that can be made a module again, found one that cannot "
            f"({summary(error)}); give the Python model it was exported from"
        ) from error


def _rebuild(program: ExportedProgram, source: str) -> Rebuilt:
    model = _with_layers(program)
    examples = _examples(program, model)
    batch = fixed_batch(model)
    notes: tuple[str, ...] = ()
    if batch is not None:
        opened, problem = open_batch(model, examples, batch)
        if opened is None:
            raise ModelLoadError(
                f"{source}: expected a program that takes any batch size, found one exported for {batch}, which {problem}; "
                "export it with dynamic_shapes=({0: torch.export.Dim('batch')},)"
            )
        model = opened
        notes = (
            f"the program was exported for a batch of {batch}; it takes any now, which was tried on random inputs",
        )
    flags = {name: module.training for name, module in model.named_modules()}
    lifted = lift(model.eval(), examples).model  # this runs it, and in train mode would move BatchNorm statistics
    assert isinstance(lifted, fx.GraphModule)
    for name, module in lifted.named_modules():
        module.training = flags.get(name, flags[""])
    if all(tensor.is_floating_point() for tensor in examples):
        lifted.meta[SHAPES] = [(1, *tensor.shape[1:]) for tensor in examples]
    return Rebuilt(lifted, notes)


def _examples(program: ExportedProgram, model: fx.GraphModule) -> Inputs:
    """Inputs like those that the program was exported with: these themselves where they are stored, otherwise of their shapes."""
    nodes = [node for node in model.graph.nodes if node.op == "placeholder"]
    given = [leaf for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, Tensor)]
    if len(given) == len(nodes):
        return tuple(given)
    values = [node.meta["val"] for node in nodes]
    shapes = [[int(n) for n in value.shape] for value in values]
    return tuple(torch.ones(shape, dtype=value.dtype) for shape, value in zip(shapes, values, strict=True))


def _with_layers(program: ExportedProgram) -> fx.GraphModule:
    """The program's graph with BatchNorms, linear layers and dropouts for operators; convolutions are lifted later."""
    root = _unguarded(program)
    graph = _flat_copy(root, program)
    layers: dict[str, list[_Layer]] = defaultdict(list)
    modes: dict[str, bool] = {}
    for node in list(graph.nodes):
        arity, function = _PLAIN.get(node.target, (0, None))
        layer = _recognised(node)
        if function is not None and len(node.args) == arity and not node.kwargs:
            node.target = function
        elif node.target in _DROPOUTS:
            modes |= _put_dropout(root, graph, node)
        elif layer is not None:
            layers[layer.path].append(layer)
    for path, found in layers.items():
        if _alone(graph, root.get_submodule(path), found):
            _put_layer(root, graph, found)
            modes[path] = found[0].training
    made = fx.GraphModule(root, graph)
    for name, module in made.named_modules():
        module.training = modes.get(name, any(modes.values()))
    return made


def _unguarded(program: ExportedProgram) -> fx.GraphModule:
    """The program's own module, if possible without the checks of its inputs."""
    options = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    made = program.module(**options)
    assert isinstance(made, fx.GraphModule)
    return made


def _flat_copy(root: fx.GraphModule, program: ExportedProgram) -> fx.Graph:
    """The graph with tensors as inputs and the program's containers as outputs, without numbers as inputs or unused tensors."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in root.graph.nodes:
        is_number = node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor)  # held as a constant too
        if node.op == "output":
            flat = fx.map_arg(list(node.args[0]), lambda n: copies[n])
            graph.output(pytree.tree_unflatten(flat, program.call_spec.out_spec))
        elif not is_number and node.target != "_guards_fn" and (node.users or node.op != "get_attr"):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return graph


@dataclass(frozen=True, slots=True)
class _Layer:
    """A call of an operator that is a layer: where its tensors are, and what they are called there."""

    node: fx.Node
    path: str
    names: frozenset[str]
    type: type[nn.Module]
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def alike(self) -> tuple[object, ...]:
        """What calls of one layer have in common."""
        return (self.names, self.type, self.training, self.momentum, self.eps)


def _recognised(node: fx.Node) -> _Layer | None:
    """The layer that a call of ``batch_norm`` or ``linear`` is; None for other calls and for tensors of several modules."""
    if node.target not in _NORMS and node.target != _aten.linear.default:
        return None
    roles = ("weight", "bias", "running_mean", "running_var")[: 4 if node.target in _NORMS else 2]
    tensors = {role: value for role, value in zip(roles, node.args[1:], strict=False) if value is not None}
    names = {str(v.target) if isinstance(v, fx.Node) and v.op == "get_attr" else "" for v in tensors.values()}
    path = next(iter(names), "").rpartition(".")[0]
    if not path or names != {f"{path}.{role}" for role in tensors} or node.kwargs:
        return None
    own = frozenset(tensors)
    if node.target not in _NORMS:
        return _Layer(node, path, own, nn.Linear)
    training, momentum, eps = _NORMS[node.target]
    kind = _NORM_TYPES.get(_input(node).meta["val"].ndim)
    if kind is None or not {"running_mean", "running_var"} <= own:
        return None
    mode = training is not None and bool(node.args[training])
    return _Layer(node, path, own, kind, mode, float(_number(node, momentum)), float(_number(node, eps)))


def _input(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _number(node: fx.Node, position: int) -> float:
    value = node.args[position]
    assert isinstance(value, int | float)
    return value


def _alone(graph: fx.Graph, holder: nn.Module, layers: Sequence[_Layer]) -> bool:
    """Whether calls are of one and the same layer, whose tensors nothing else needs."""
    first = layers[0]
    held = {name for name, _ in (*named_parameters_of(holder), *holder.named_buffers())}
    wanted = {f"{first.path}.{name}" for name in first.names}
    nodes = {layer.node for layer in layers}
    users = {user for node in graph.nodes if node.op == "get_attr" and node.target in wanted for user in node.users}
    same = all(layer.alike == first.alike for layer in layers)
    return same and users == nodes and held - {"num_batches_tracked"} == first.names


def _put_layer(root: fx.GraphModule, graph: fx.Graph, layers: Sequence[_Layer]) -> None:
    """A module in place of the tensors, and calls of it in place of the operator."""
    first = layers[0]
    holder = root.get_submodule(first.path)
    above, _, name = first.path.rpartition(".")
    setattr(root.get_submodule(above), name, _layer_module(holder, first))
    for layer in layers:
        with graph.inserting_before(layer.node):
            call = graph.call_module(first.path, (layer.node.args[0],))
        call.meta = dict(layer.node.meta)
        if layer.node.target == _aten._native_batch_norm_legit_no_training.default:
            for item in list(layer.node.users):  # the first of what it returns; the others are statistics
                item.replace_all_uses_with(call)
                graph.erase_node(item)
        layer.node.replace_all_uses_with(call)
        graph.erase_node(layer.node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] == first.path:
            _erase_with_users(graph, node)


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a tensor that belongs to a layer now, and the operators that counted its batches."""
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _layer_module(holder: nn.Module, layer: _Layer) -> nn.Module:
    """The layer as a module, which takes over the tensors of ``holder`` themselves."""
    tensors = dict(named_parameters_of(holder)) | dict(holder.named_buffers())
    weight = tensors.get("weight")
    if layer.type is nn.Linear:
        assert weight is not None
        made: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in layer.names, device="meta")
    else:
        features = len(tensors["running_mean"])
        made = layer.type(features, layer.eps, layer.momentum, affine=weight is not None, device="meta")
        made.register_parameter("bias", None)  # ``affine`` makes both, and a BatchNorm may have a weight alone
        counted = tensors.get("num_batches_tracked")
        made.register_buffer("num_batches_tracked", torch.tensor(0) if counted is None else counted)
    for name in layer.names:
        tensor = tensors[name]
        if name in made._buffers:
            made.register_buffer(name, tensor)
        else:
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            made.register_parameter(name, own)
    return made


def _put_dropout(root: fx.GraphModule, graph: fx.Graph, node: fx.Node) -> dict[str, bool]:
    """Put a module, whose mode can change, in place of a dropout operator; its name -> whether it was exported in train mode."""
    share, mode = node.args[1], bool(node.args[2])
    assert isinstance(share, float | int)
    name = node.name
    while hasattr(root, name):
        name += "_layer"
    root.add_module(name, _DROPOUTS[node.target](share))
    with graph.inserting_before(node):
        call = graph.call_module(name, (node.args[0],))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return {name: mode}
