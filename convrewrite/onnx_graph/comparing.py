"""Two ONNX files side by side, where one of them chooses detections: what the choice is made from is compared."""

from collections.abc import Mapping
from pathlib import Path

import onnx
from torch import Tensor

from convrewrite.inputs import Inputs, varied
from convrewrite.onnx_files import OnnxModel, read_model
from convrewrite.onnx_graph.example_axis import ExampleAxis
from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.observing import Observer, with_outputs
from convrewrite.onnx_graph.ordering import put_in_order
from convrewrite.onnx_graph.outputs import SELECTS, judged_values
from convrewrite.onnx_graph.views import Constants
from convrewrite.onnx_graph.walks import inner_graphs


def comparable(runners: tuple[OnnxModel, OnnxModel], inputs: Inputs) -> tuple[OnnxModel, OnnxModel, str] | None:
    """Both files with the values by which they can be compared as outputs, and a sentence on that; None where these are
    their outputs anyway, or where the second has no such values.

    Both were opened and run on ``inputs`` before, so they are known to take these, and to end.
    """
    paths = [Path(runner.where) for runner in runners]
    models = [read_model(path) for path in paths]
    put_in_order(models[0].graph)
    if not any(_chooses(model.graph) for model in models):
        return None
    own, held = _divided(runners[0], models[0], inputs)
    file = OnnxFile(models[0], paths[0].absolute().parent, str(paths[0]), paths[0])
    runs = _runs(file, own, held)
    if not runs:
        return None
    judged = judged_values(models[0].graph, Constants(file, own, held).names, runs)
    there = {name for node in models[1].graph.node for name in node.output}
    if judged.note is None or not judged.names or not set(judged.names) <= there:
        return None
    first, second = (
        OnnxModel(
            with_outputs(model, judged.names).SerializeToString(), trust=True, folder=path.absolute().parent,
            held=runner.held,
        )
        for model, path, runner in zip(models, paths, runners, strict=True)
    )  # fmt: skip
    return first, second, judged.note


def _chooses(graph: onnx.GraphProto) -> bool:
    return any(node.op_type == SELECTS or any(map(_chooses, inner_graphs(node))) for node in graph.node)


def _divided(runner: OnnxModel, model: onnx.ModelProto, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs with as many examples as the file takes at a time, and those that are the same for all examples."""
    given = dict(zip(runner.input_names, inputs, strict=True))
    with_examples, _ = ExampleAxis.of(model).divided({**given, **runner.held})
    own = {name: tensor[: runner.batch] for name, tensor in given.items() if name in with_examples}
    return own, {**{name: tensor for name, tensor in given.items() if name not in own}, **runner.held}


def _runs(file: OnnxFile, own: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> list[dict[str, object]]:
    observer = Observer(file, dict.fromkeys(name for node in file.model.graph.node for name in node.output if name))
    batches = (tuple(own.values()), varied(tuple(own.values())))
    runs = [
        observer.run({name: x.detach().numpy() for name, x in (*zip(own, batch, strict=True), *held.items())})
        for batch in batches
    ]
    return [run for run in runs if run is not None]
