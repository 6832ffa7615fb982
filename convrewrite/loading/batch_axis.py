"""The batch axis of an exported program: which size it was exported for, and opening it where that is certain.

A program exported with static shapes has its batch size as a constant wherever the model asked for it, as in
``x.view(x.shape[0], -1)``. Such a constant at the front of a shape is replaced by the size of the axis it stands for, which
changes nothing for the old size; and the result is kept only if several random batches get the same outputs together
as each by itself.
"""

import copy

import torch
from torch import Tensor, fx

from convrewrite.inputs import Inputs
from convrewrite.modules import alike, kept_outputs, named_outputs, run
from convrewrite.process import quiet

_aten = torch.ops.aten

_KEEPING = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
"""Operators ``(x, shape)`` in which a first number of the shape that equals the first axis of x stands for that axis."""

_MAKING: dict[object, int] = {
    _aten.expand.default: 1,
    _aten.new_zeros.default: 1,
    _aten.new_ones.default: 1,
    _aten.new_full.default: 1,
    _aten.zeros.default: 0,
    _aten.ones.default: 0,
    _aten.full.default: 0,
    _aten.randn.default: 0,
    _aten.rand.default: 0,
}
"""Operators that make a tensor of a given shape -> the position of that argument."""

_UNCHECKED = (_aten.lstm.input,)
"""Operators that torch runs on a state of another batch size than the input's, and then writes beyond its memory."""

BATCHES = 3
"""Number of batches of the old size that the opened program gets at once when it is tried."""

ROUNDING = 1e4
"""Units of rounding by which outputs may differ, relative to the largest: sums of several examples go in another order."""


def fixed_batch(program: fx.GraphModule) -> int | None:
    """The batch size that the program's first input was exported with; None when it was left open."""
    first = next((node for node in program.graph.nodes if node.op == "placeholder"), None)
    value = None if first is None else first.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(value.shape[0], int):
        return None
    return value.shape[0]


def open_batch(program: fx.GraphModule, inputs: Inputs, batch: int) -> tuple[fx.GraphModule | None, str]:
    """A copy of the program that takes any batch size, or None and what is in the way.

    ``inputs`` are of the shapes it was exported with.
    """
    if any(node.target in _UNCHECKED for node in program.graph.nodes):
        return None, "has an LSTM, whose first state is of that size"
    opened = copy.deepcopy(program)
    _replace_sizes(opened.graph, batch)
    opened.recompile()
    # Double precision shows even the slightest mixing of examples; a program with a dtype in its graph does not run in it.
    for dtype in (torch.float64, None):
        try:
            same = _treats_batches_alike(program, opened, inputs, dtype)
        except Exception:  # with a batch of another size any operator may fail in any way
            continue
        return (opened, "") if same else (None, "gives other outputs for another")
    return None, "does not run on another"


def _replace_sizes(graph: fx.Graph, batch: int) -> None:
    first = next(node for node in graph.nodes if node.op == "placeholder")
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _KEEPING and _leading(node.args[0]) == batch:
            _replace_leading(graph, node, 1, batch, node.args[0])
        elif node.target in _MAKING:
            _replace_leading(graph, node, _MAKING[node.target], batch, first)


def _leading(value: object) -> int | None:
    """The size of the first axis of a node's value as exported."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    axes: list[object] = list(tensor.shape) if isinstance(tensor, Tensor) else []
    return axes[0] if axes and isinstance(axes[0], int) else None


def _replace_leading(graph: fx.Graph, node: fx.Node, position: int, batch: int, owner: fx.node.Argument) -> None:
    """In the shape at ``position`` of the arguments replace a leading ``batch`` by the size of ``owner``'s first axis."""
    shape = node.args[position]
    assert isinstance(shape, list | tuple)
    if not shape or not isinstance(shape[0], int) or shape[0] != batch:
        return
    with graph.inserting_before(node):
        size = graph.call_function(_aten.sym_size.int, (owner, 0))
    node.update_arg(position, [size, *shape[1:]])


def _treats_batches_alike(
    closed: fx.GraphModule, opened: fx.GraphModule, inputs: Inputs, dtype: torch.dtype | None
) -> bool:
    """Whether several batches at once give what they give one by one; both in eval mode, where examples do not mix."""
    modules = [copy.deepcopy(program).eval().to(dtype) for program in (closed, opened)]
    several = [tuple(_another(tensor, index, dtype) for tensor in inputs) for index in range(BATCHES)]
    with quiet():  # a graph module prints where it fails
        each = [kept_outputs(modules[0], one) for one in several]
        together = named_outputs(run(modules[1], tuple(torch.cat(parts) for parts in zip(*several, strict=True))))
    apart = {name: torch.cat([one[name] for one in each]) for name in together}
    finite = all(bool(output.isfinite().all()) for output in together.values())  # infinity and NaN would prove nothing
    return finite and alike(apart, together, ROUNDING)


def _another(tensor: Tensor, index: int, dtype: torch.dtype | None) -> Tensor:
    """Other numbers of the same shape, on another scale; integers may be indices and stay."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(index)
    return (torch.randn(tensor.shape, generator=generator) * (1 + index)).to(dtype or tensor.dtype)
