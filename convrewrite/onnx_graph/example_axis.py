"""Which inputs of a graph have examples along their first axis, and which are the same for all, as anchors or a rate are."""

from collections.abc import Mapping, Sequence

import onnx
from torch import Tensor

from convrewrite.onnx_files import OnnxModel
from convrewrite.onnx_graph.views import names_used

IMAGE_AXES = 3
"""Axes of what a convolution takes, at least."""

CONVOLVES = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv", "NhwcConv", "NhwcFusedConv")

Axis = int | str | None
"""An axis as a graph states it: its size, its name, or nothing."""


def inputs_of_examples(source: onnx.ModelProto | OnnxModel) -> tuple[str, ...]:
    """The inputs that may have examples along their first axis, as the graph states its axes: those with a free first axis, or,
    where the main input has so many examples, those with as many."""
    model = _model_of(source)
    first = {name: shape[0] if shape else None for name, shape in _shapes(model).items() if shape != ()}
    main = _main(model)
    if main is None:
        return tuple(first)
    free = not isinstance(first.get(main), int)
    return tuple(name for name, size in first.items() if (not isinstance(size, int) if free else size == first[main]))


def divided(
    source: onnx.ModelProto | OnnxModel, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs that have examples along their first axis, as many as the main one, and the others."""
    model = _model_of(source)
    able = [name for name in inputs_of_examples(model) if inputs[name].ndim] or list(inputs)[:1]
    main = _main(model)
    examples = _length(inputs[main if main in able else able[0]])
    own = {name: tensor for name, tensor in inputs.items() if name in able and _length(tensor) == examples}
    return own, {name: tensor for name, tensor in inputs.items() if name not in own}


def _model_of(source: onnx.ModelProto | OnnxModel) -> onnx.ModelProto:
    return source if isinstance(source, onnx.ModelProto) else onnx.load(source.where, load_external_data=False)


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.ndim else 1


def _main(model: onnx.ModelProto) -> str | None:
    """The input that examples are counted by: of those with more axes than one, the first whose first axis is free, else the
    first that is an image or a series to a convolution, else the first of all."""
    shapes = {name: shape for name, shape in _shapes(model).items() if shape is None or len(shape) > 1}
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
    """Those of ``names`` that what convolutions take is made of."""
    makers = {name: node for node in graph.node for name in node.output}
    waiting = [node.input[0] for node in graph.node if node.op_type in CONVOLVES]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += names_used(makers[name]) if name in makers else ()
    return seen & set(names)
