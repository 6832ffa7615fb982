"""Which inputs of a graph have examples along their first axis, and which are the same for all, such as anchors or a rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from torch import Tensor

from convrewrite.onnx_files import OnnxModel, read_model
from convrewrite.onnx_graph.views import names_used

IMAGE_AXES = 3
"""Fewest axes of what a convolution takes."""

CONVOLVES = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv", "NhwcConv", "NhwcFusedConv")

Axis = int | str | None
"""An axis as a graph states it: its size, its name, or nothing."""


@dataclass(frozen=True, slots=True)
class ExampleAxis:
    """What a graph states of examples.

    Attributes:
        names: the inputs that may have examples along their first axis: those where it is free or, if the main input's has a
            fixed size, those of the same size.
        main: the input that examples are counted by, None where all are single numbers.
    """

    names: tuple[str, ...]
    main: str | None

    @classmethod
    def of(cls, source: onnx.ModelProto | OnnxModel) -> "ExampleAxis":
        """That of a model, or of a file."""
        model = _model_of(source)
        first = {name: shape[0] if shape else None for name, shape in _shapes(model).items() if shape != ()}
        main = _main(model)
        if main is None:
            return cls(tuple(first), None)
        size = first.get(main)
        alike = (
            name for name, one in first.items() if (one == size if isinstance(size, int) else not isinstance(one, int))
        )
        return cls(tuple(alike), main)

    def divided(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs that have examples along their first axis, as many as the main one, and the others."""
        able = [name for name in self.names if inputs[name].ndim] or list(inputs)[:1]
        examples = _length(inputs[self.main if self.main in able else able[0]])
        own = {name: tensor for name, tensor in inputs.items() if name in able and _length(tensor) == examples}
        return own, {name: tensor for name, tensor in inputs.items() if name not in own}


def _model_of(source: onnx.ModelProto | OnnxModel) -> onnx.ModelProto:
    return source if isinstance(source, onnx.ModelProto) else read_model(source.where)


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.ndim else 1


def _main(model: onnx.ModelProto) -> str | None:
    """The input that examples are counted by: of those with more axes than one, the first whose first axis is free (those that
    lead to a convolution come before others); otherwise the first that leads to a convolution (images and series come before
    others); otherwise the first of all."""
    axes = {name: shape for name, shape in _shapes(model).items() if shape != ()}
    shapes = {name: shape for name, shape in axes.items() if shape is None or len(shape) > 1} or axes
    convolved = _convolved(model.graph, shapes)
    free = [name for name, shape in shapes.items() if shape is None or not isinstance(shape[0], int)]
    large = [name for name, shape in shapes.items() if shape is None or len(shape) >= IMAGE_AXES]
    for group in (
        [name for name in free if name in convolved],
        free,
        [name for name in large if name in convolved],
        [name for name in shapes if name in convolved],
    ):
        if group:
            return group[0]
    return next(iter(shapes), None)


def _shapes(model: onnx.ModelProto) -> dict[str, Sequence[Axis] | None]:
    """The axes of inputs that have to be given, None where not even their number is stated."""
    stored = {tensor.name for tensor in model.graph.initializer}
    stored |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    found: dict[str, Sequence[Axis] | None] = {}
    for entry in model.graph.input:
        if entry.name not in stored:
            kind = entry.type.tensor_type
            axes = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None for axis in kind.shape.dim]
            found[entry.name] = tuple(axes) if kind.HasField("shape") else None
    return found


def _convolved(graph: onnx.GraphProto, names: Mapping[str, object]) -> set[str]:
    """Those of ``names`` from which the inputs of convolutions are computed."""
    makers = {name: node for node in graph.node for name in node.output}
    waiting = [node.input[0] for node in graph.node if node.op_type in CONVOLVES]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += names_used(makers[name]) if name in makers else ()
    return seen & set(names)
