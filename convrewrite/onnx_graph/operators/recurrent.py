"""Recurrent layers whose weights are constants, as torch's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.modules import Operator
from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Made, Maker, constant, dynamic


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of recurrent layer: torch's module, for each of its gates the place of that gate in ONNX, and the activations."""

    layer: Callable[..., nn.RNNBase]
    gates: tuple[int, ...]
    activations: tuple[str, ...]


CELLS = {
    "LSTM": Cell(nn.LSTM, (0, 2, 3, 1), ("sigmoid", "tanh", "tanh")),
    "GRU": Cell(nn.GRU, (1, 0, 2), ("sigmoid", "tanh")),
    "RNN": Cell(nn.RNN, (0,), ("tanh",)),
}
"""Operators -> their kinds. ONNX has the gates of an LSTM as input, output, forget, cell, and of a GRU as update, reset."""

WEIGHTS, RECURRENT, BIASES, LENGTHS, HIDDEN, CELL, PEEPHOLES = range(1, 8)
"""Positions of the inputs behind the sequence."""


class ResetBefore(nn.Module):
    """A GRU that resets its state before it multiplies it, where torch's does so afterwards; called as torch's is.

    Weights are those of ONNX: (direction, gate * feature, input), the gates being update, reset, hidden.
    """

    weights: Tensor
    recurrent: Tensor
    biases: Tensor

    def __init__(self, weights: Tensor, recurrent: Tensor, biases: Tensor) -> None:
        super().__init__()
        self.hidden_size = recurrent.shape[-1]
        self.bidirectional = len(weights) == 2
        self.register_buffer("weights", weights)
        self.register_buffer("recurrent", recurrent)
        self.register_buffer("biases", biases)

    def forward(self, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """All states, features of both directions side by side, and the last ones by direction."""
        values, last = [], []
        for direction, state in enumerate(start):
            states = self._states(direction, x.flip(0) if direction else x, state)
            values.append(states.flip(0) if direction else states)
            last.append(states[-1])
        return torch.cat(values, -1), torch.stack(last)

    def _states(self, direction: int, x: Tensor, state: Tensor) -> Tensor:
        recurrent, (bias, recurrent_bias) = self.recurrent[direction], self.biases[direction].chunk(2)
        gates, hidden = recurrent[: 2 * self.hidden_size], recurrent[2 * self.hidden_size :]
        inputs = F.linear(x, self.weights[direction], bias + recurrent_bias)
        states = []
        for step in inputs:
            update, reset, new = step.chunk(3, -1)
            update_state, reset_state = F.linear(state, gates).chunk(2, -1)
            update, reset = torch.sigmoid(update + update_state), torch.sigmoid(reset + reset_state)
            candidate = torch.tanh(new + F.linear(reset * state, hidden))
            state = (1 - update) * candidate + update * state
            states.append(state)
        return torch.stack(states)


class Recurrent(Operator):
    """A recurrent layer of torch, called as the ONNX operator with the inputs that are no constants.

    Gives all states (time, direction, batch, feature), then the last ones of each direction.
    """

    def __init__(self, layer: nn.RNNBase | ResetBefore, view: NodeView, backwards: bool) -> None:
        super().__init__()
        self.layer = layer
        self.backwards = backwards
        self.single = len(view.outputs) == 1
        self.dynamic = tuple(i for i in (HIDDEN, CELL) if dynamic(view, i))
        self.register_buffer("constant_hidden", constant(view, HIDDEN))
        self.register_buffer("constant_cell", constant(view, CELL))

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        """The sequence is (time, batch, feature)."""
        given = dict(zip(self.dynamic, states, strict=True))
        start = self._start(x, given)
        values, last = self.layer(x.flip(0) if self.backwards else x, start)
        if self.backwards:
            values = values.flip(0)
        directions = 2 if self.layer.bidirectional else 1
        values = values.unflatten(-1, (directions, self.layer.hidden_size)).transpose(1, 2)
        if self.single:
            return values
        return (values, *last) if isinstance(last, tuple) else (values, last)

    def _start(self, x: Tensor, given: dict[int, Tensor]) -> Any:
        """The states before the first step, zeros where none are given."""
        directions = 2 if self.layer.bidirectional else 1
        zeros = x.new_zeros(directions, x.shape[1], self.layer.hidden_size)
        hidden = given.get(HIDDEN, self.constant_hidden)
        hidden = zeros if hidden is None else hidden
        if not isinstance(self.layer, nn.LSTM):
            return hidden
        cell = given.get(CELL, self.constant_cell)
        return hidden, zeros if cell is None else cell


def make_recurrent(view: NodeView) -> Made | None:
    """None where weights are computed, sequences have lengths of their own, or a step is not torch's."""
    cell = CELLS[view.op_type]
    weights, recurrent = constant(view, WEIGHTS), constant(view, RECURRENT)
    computed = any(dynamic(view, i) for i in (BIASES, LENGTHS, PEEPHOLES))
    odd = constant(view, LENGTHS) is not None or constant(view, PEEPHOLES) is not None
    if weights is None or recurrent is None or computed or odd or not dynamic(view, 0) or not _plain_step(view):
        return None
    directions, _, inputs = weights.shape
    activations = [name.lower() for name in view.attributes.get("activations") or cell.activations * directions]
    keywords: dict[str, Any] = {}
    if view.op_type == "RNN" and activations == ["relu"] * directions:
        keywords = {"nonlinearity": "relu"}
    elif activations != [*cell.activations] * directions:
        return None
    biases = constant(view, BIASES)
    if biases is None:
        biases = weights.new_zeros(directions, 2 * weights.shape[1])
    backwards = view.attributes.get("direction", "forward") == "reverse"
    if view.op_type == "GRU" and not view.attributes.get("linear_before_reset", 0):
        return Recurrent(ResetBefore(weights, recurrent, biases), view, backwards)
    layer = cell.layer(inputs, recurrent.shape[-1], bidirectional=directions == 2, dtype=weights.dtype, **keywords)
    _fill(layer, cell, weights, recurrent, biases)
    return Recurrent(layer, view, backwards)


def _plain_step(view: NodeView) -> bool:
    """Whether nothing is cut off or coupled, and the batch is the second axis."""
    given = view.attributes
    special = ("clip", "activation_alpha", "activation_beta")
    return not given.get("layout", 0) and not given.get("input_forget", 0) and not any(given.get(n) for n in special)


def _fill(layer: nn.RNNBase, cell: Cell, weights: Tensor, recurrent: Tensor, biases: Tensor) -> None:
    """Copy weights of ONNX, (direction, gate * feature, input), and biases, whose second half is the recurrent one."""
    order = torch.tensor(cell.gates)
    values = {"weight_ih": weights, "weight_hh": recurrent}
    values["bias_ih"], values["bias_hh"] = biases.chunk(2, 1)
    with torch.no_grad():
        for name, value in values.items():
            for direction, suffix in enumerate(("", "_reverse")[: len(value)]):
                gates = value[direction].unflatten(0, (len(cell.gates), -1))
                layer.get_parameter(f"{name}_l0{suffix}").copy_(gates[order].flatten(0, 1))
    layer.requires_grad_(False)


RECURRENT_LAYERS: dict[str, Maker] = dict.fromkeys(CELLS, make_recurrent)
"""Operators of recurrent layers -> their maker."""
