"""The light models of the onnx package: the graphs of the first networks in ONNX, whose weights are made by nodes that repeat one
number.

As they are they answer every image alike, so that errors would not be seen; so there are the same graphs with drawn weights, too.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_corpus import Entry, UnavailableError
from onnx_inputs import garments, one

EXAMPLES = 2
"""Examples to calibrate on where weights are drawn, for which more are of no use. The files as they are get none: with all
weights alike, numbers grow from layer to layer up to 2e19, and nothing can be fitted to their covariance."""

SIZE = 224
"""Height and width of their images, which the files fix."""

GPU_DATA = "gpu_0/data_0"
INPUTS = {
    "bvlc_alexnet": "data_0",
    "densenet121": "data_0",
    "inception_v1": "data_0",
    "inception_v2": "data_0",
    "resnet50": GPU_DATA,
    "shufflenet": GPU_DATA,
    "squeezenet": "data_0",
    "vgg19": "data_0",
    "zfnet512": GPU_DATA,
}
"""Inputs of the light models by their names."""

DRAWN = ("densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet")
"""Networks that are also taken with drawn weights: those without huge dense layers, which would take half a gigabyte each."""

POSITIVE = {("BatchNormalization", 1), ("BatchNormalization", 4), ("Mul", 1)}
"""Operators and the positions of inputs that must be positive: scales and variances."""


def light(name: str, folder: Path) -> Path:
    """The file as the package has it."""
    del folder
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    if not path.exists():
        raise UnavailableError(f"this onnx package has no {path.name}")
    return path


def drawn(name: str, folder: Path) -> Path:
    """The graph with weights that are drawn, written unless it is there."""
    path = folder / "light" / f"{name}_drawn.onnx"
    if path.exists():
        return path
    model = onnx.load(light(name, folder))
    draw_weights(model.graph, np.random.default_rng(0))
    end_before_softmax(model.graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    onnx.save(model, unfinished)
    return unfinished.replace(path)


def draw_weights(graph: onnx.GraphProto, draw: np.random.Generator) -> None:
    """Put initialisers of random numbers in the place of the nodes that make weights."""
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = places(graph.node)
    makers = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    for node in makers:
        name, shape = node.output[0], tuple(int(size) for size in shapes[node.input[0]])
        graph.initializer.append(numpy_helper.from_array(weights(shape, spread_places(name, readers), draw), name))
        graph.node.remove(node)


def end_before_softmax(graph: onnx.GraphProto) -> None:
    """Leave the last Softmax out: with weights that nobody trained it gives nearly the same for every image."""
    last = graph.node[-1]
    if last.op_type == "Softmax":
        graph.output[0].name = last.input[0]
        graph.node.remove(last)


def places(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
    """For every value the nodes that read it, and as which input."""
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in nodes:
        for index, name in enumerate(node.input):
            readers[name].append((node, index))
    return readers


def spread_places(name: str, readers: Mapping[str, list[tuple[onnx.NodeProto, int]]]) -> set[tuple[str, int]]:
    """Operators that read the value and as which input, also through Unsqueeze."""
    found: set[tuple[str, int]] = set()
    for node, index in readers[name]:
        found |= spread_places(node.output[0], readers) if node.op_type == "Unsqueeze" else {(node.op_type, index)}
    return found


def weights(shape: tuple[int, ...], read_as: set[tuple[str, int]], draw: np.random.Generator) -> NDArray[np.float32]:
    """Numbers that keep the scale of what goes through, as trained weights do."""
    if len(shape) > 1:
        return (draw.normal(size=shape) * math.sqrt(2 / math.prod(shape[1:]))).astype(np.float32)
    if read_as & POSITIVE:
        return draw.uniform(0.5, 1.5, shape).astype(np.float32)
    return draw.normal(0, 0.1, shape).astype(np.float32)


def entries() -> tuple[Entry, ...]:
    images = partial(garments, height=SIZE, width=SIZE)
    package = f"onnx {onnx.__version__}"
    whole = [
        Entry(f"light_{name}", package, "light", partial(light, name), one(key, images), 1, 0)
        for name, key in INPUTS.items()
    ]
    varied = [
        Entry(
            f"{name}_drawn",
            f"{package}, weights drawn",
            "light",
            partial(drawn, name),
            one(INPUTS[name], images),
            1,
            EXAMPLES,
        )
        for name in DRAWN
    ]
    return (*whole, *varied)


LIGHT = entries()
"""Light models as they are, and with weights that are drawn."""
