"""A rewritten module's convolutions, put back into the graph that the module was made of."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.inputs import Inputs
from convrewrite.layers import SumOfBranches
from convrewrite.onnx_files import OnnxModel, read_model
from convrewrite.onnx_graph.file import Replacement
from convrewrite.onnx_graph.observing import with_outputs
from convrewrite.onnx_graph.opening import open_onnx
from convrewrite.onnx_graph.surgery import names_of_weights, write_rewritten
from convrewrite.onnx_graph.translating import Translation, translation_of
from convrewrite.runtime import Exported, Exporter, TorchExporter
from convrewrite.state import parameters_of


class GraphExporter:
    """Puts what was rewritten into the graph that a module was made of; see :class:`convrewrite.runtime.Exporter`."""

    exports = False
    beyond = ()

    def __init__(self, translation: Translation) -> None:
        self._translation = translation

    @property
    def source(self) -> str:
        """The digest of the file as it came. Raises ModelLoadError where it is another by now."""
        return self._translation.opened.source_files.digest()

    def require_source(self) -> None:
        """Raise ModelLoadError where the file, or one that holds weights of it, is another by now."""
        self._translation.opened.source_files.require_unchanged()

    def original(self, _model: nn.Module, _inputs: Inputs, _path: Path) -> Exported:
        """The file as it came. Raises ModelLoadError where it is another by now."""
        batch, opened = self._translation.batch, self._translation.opened
        opened.source_files.digest()  # so early that a file that is only touched later is known
        return Exported(opened.path, batch is None, None, batch)

    def rewritten(self, model: nn.Module, _inputs: Inputs, path: Path, metadata: Mapping[str, str]) -> Exported:
        """The graph with what ``model`` has in place of its convolutions. Raises ExportError, UsageError."""
        file, batch = self._translation.opened.file, self._translation.batch
        notes = write_rewritten(file, tuple(_replacements(self._translation, model)), path, metadata)
        self.require_source()  # weights that lie beside the file were copied just now
        return Exported(path, batch is None, "; ".join(notes) or None, batch)

    def runner(self, path: Path) -> OnnxModel:
        """A file whose outputs are the values by which a result is judged; the file itself where these are its own outputs."""
        names = list(self._translation.judged.names)
        model = read_model(path)
        if [entry.name for entry in model.graph.output] == names:
            return OnnxModel(path, trust=True, held=self._translation.held)
        changed = with_outputs(model, names).SerializeToString()
        return OnnxModel(changed, trust=True, folder=path.parent, held=self._translation.held)

    def feed(self, inputs: Inputs) -> Inputs:
        """``inputs`` and those that the module holds, in the order of the file."""
        own = dict(zip(self._translation.inputs, inputs, strict=True))
        return tuple(
            (own | dict(self._translation.held))[name] for name in self._translation.opened.session.input_names
        )


def exporter_of(model: nn.Module, opset: int | None = None, free_axes: tuple[str, ...] | None = None) -> Exporter:
    """Who makes the ONNX files of a run on this model; ``opset`` and ``free_axes`` are as in :func:`convrewrite.export`.

    Raises UsageError for these where the model is a graph, which keeps its own."""
    translation = translation_of(model)
    if translation is None:
        return TorchExporter(opset, free_axes)
    if opset is not None or free_axes is not None:
        raise UsageError(
            "--opset, --free-axes: expected a PyTorch model, found an ONNX graph, whose opset and axes the result keeps; "
            "leave them out"
        )
    return GraphExporter(translation)


def take_numbers(model: nn.Module, path: Path) -> None:
    """Fill the replacements of convolutions in ``model``, which was made of a graph, with the numbers that they had when they
    were written to ``path``: surgery gives the same weights the same names every time.

    Raises ModelLoadError for a file that lacks them, or has them in other shapes.
    """
    translation = translation_of(model)
    assert translation is not None, "the model was made of a graph"
    replacements = tuple(_replacements(translation, model))
    parameters = {id(p): p for replacement in replacements for p in parameters_of(replacement.module)}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()  # arbitrary memory could look like numbers that do not fit the graph's type
    names = names_of_weights(translation.opened.file, replacements)
    file = open_onnx(path).file
    stored = {tensor.name: tensor for tensor in file.model.graph.initializer}
    for identity, parameter in parameters.items():
        name = names[identity]
        found = tuple(stored[name].dims) if name in stored else None
        if found != tuple(parameter.shape):
            raise ModelLoadError(
                f"{path}: {name}: expected numbers of shape {tuple(parameter.shape)}, found {found or 'none'}; expected the file "
                "that was written with the plan beside it"
            )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(file.array(stored[name]).astype(np.float64)))


def _replacements(translation: Translation, model: nn.Module) -> Iterator[Replacement]:
    """The convolutions that were replaced, each with the BatchNorm that went with it."""
    nodes = translation.opened.file.model.graph.node
    norms = {
        nodes[index].input[0]: index
        for name, index in translation.nodes.items()
        if nodes[index].op_type == "BatchNormalization" and isinstance(model.get_submodule(name), nn.Identity)
    }
    for name, index in translation.nodes.items():
        module = model.get_submodule(name)
        if not isinstance(module, nn.Sequential | SumOfBranches):
            continue
        pads, auto_pad = translation.pads.get(name, ((), ""))
        kind = translation.weight_types.get(nodes[index].input[1], 0)
        yield Replacement(index, module, norms.get(nodes[index].output[0]), pads, auto_pad, kind)
