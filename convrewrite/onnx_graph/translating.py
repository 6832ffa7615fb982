"""An ONNX graph -> a module for the pipeline: layers and functions of torch where these compute the same, and regions that
onnxruntime runs where they do not.

Every node is tried on what onnxruntime gave for it in runs of the whole graph, so that no reading of the standard has to be
believed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.inputs import INPUT_NAMES, Inputs, varied
from convrewrite.modules import Shared
from convrewrite.onnx_graph.building import Builder, Built
from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.observing import Observer, Values
from convrewrite.onnx_graph.opening import Opened
from convrewrite.onnx_graph.outputs import Judged, judged_values
from convrewrite.onnx_graph.trying import close, least_scale
from convrewrite.onnx_graph.views import Constants

TRANSLATION = "convrewrite.translation"
"""The key of a graph module's ``meta`` under which its Translation stands."""


@dataclass(frozen=True, slots=True, eq=False)
class Translation(Shared):
    """What a module has to do with the graph it was made of.

    Attributes:
        opened: the file, and its session.
        judged: the values that the module gives.
        nodes: positions of the nodes that convolutions and BatchNorms were, by the names of these modules.
        pads: for convolutions, zeros and ``auto_pad`` that stand before them, by name.
        opaque: operators of the nodes that onnxruntime runs, with how many of each.
        blocks_gradients: whether real numbers go through these.
        sizes: shapes of values in the example run.
        batch: the number of examples that the graph takes; None for any.
        module_batch: the same of the module, which may take any where the graph does not.
    """

    opened: Opened
    judged: Judged
    nodes: Mapping[str, int]
    pads: Mapping[str, tuple[tuple[int, ...], str]]
    opaque: Mapping[str, int]
    blocks_gradients: bool
    sizes: Mapping[str, tuple[int, ...]]
    batch: int | None
    module_batch: int | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, a sentence each."""
        notes = [] if self.judged.note is None else [self.judged.note]
        if self.opaque:
            named = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in self.opaque.items())
            ends = "; gradients end there: of sites before them all output channels count alike where no other way leads on"
            notes.append(
                f"run by onnxruntime itself, as torch has no equal: {named}{ends if self.blocks_gradients else ''}"
            )
        if self.batch is not None:
            notes.append(f"the graph takes {self.batch} example{'s' if self.batch > 1 else ''} at a time")
        return tuple(notes)


def translation_of(model: object) -> Translation | None:
    """That of a module made of an ONNX graph; None for other models."""
    found: Translation | None = getattr(model, "meta", {}).get(TRANSLATION)
    return found


def is_graph(model: object) -> bool:
    """Whether a module was made of an ONNX graph."""
    return translation_of(model) is not None


def batch_of(model: object) -> int | None:
    """How many examples a module made of an ONNX graph takes at a time; None for any number, and for other models."""
    translation = translation_of(model)
    return None if translation is None else translation.module_batch


def translate(opened: Opened, inputs: Inputs) -> fx.GraphModule:
    """The graph as a module that takes tensors in the order of its inputs and gives its outputs by their names.

    Raises ModelLoadError for a graph whose nodes together give something else than the graph does in onnxruntime.
    """
    runs, batch = _observed(opened, inputs)
    constants = Constants(opened.file, opened.session.input_names)
    constants.learn(runs[0])
    judged = judged_values(opened.file.model.graph, constants.names, runs[:2])
    if not judged.names:
        raise UsageError(
            f"{opened.file.source}: expected outputs that hang on the inputs, found none; nothing can be judged"
        )
    feeds = _batches(inputs)
    # The first one again: random numbers repeat themselves from session to session, but not from call to call.
    checks = [*zip(feeds, runs, strict=False), (feeds[0], runs[0])]
    scales = {name: least_scale(node.op_type) for node in opened.file.model.graph.node for name in node.output}
    for with_operators in (True, False):
        built = Builder(opened.file, constants, runs, opened.session.input_names).build(judged.names, with_operators)
        if all(_same(built, feed, run, scales) for feed, run in checks):
            takes_any = batch is None or _takes_both(built, feeds, runs)
            return _module(opened, judged, built, runs[0], (batch, None if takes_any else batch))
    raise ModelLoadError(
        f"{opened.file.source}: expected that its nodes one by one give what the whole graph gives in onnxruntime, found "
        "otherwise; a node may give other values at every call: take it out, or export the graph again"
    )


def _batches(inputs: Inputs) -> list[Inputs]:
    """The example, other numbers, and both together."""
    other = varied(inputs)
    return [inputs, other, tuple(torch.cat([a, b]) if a.ndim else a for a, b in zip(inputs, other, strict=True))]


def _observed(opened: Opened, inputs: Inputs) -> tuple[list[Values], int | None]:
    """The values of all nodes for the batches that the graph takes, and how many examples it takes if not any number."""
    opened.session(*inputs)  # in a process of its own first, as it may not end
    names = [name for node in opened.file.model.graph.node for name in node.output if name]
    observer = Observer(opened.file, dict.fromkeys(names))
    runs: list[Values] = []
    for batch in _batches(inputs):
        feed = {name: tensor.numpy() for name, tensor in zip(opened.session.input_names, batch, strict=True)}
        found = observer.run(feed)
        if found is not None:
            runs.append(feed | found)
        elif not runs:
            raise ModelLoadError(
                f"{opened.file.source}: onnxruntime cannot run it on the example; give another with --input"
            )
        else:
            break
    if len(runs) == 3 and _adds_up(opened.file, runs):
        return runs, None
    return runs[:2], int(inputs[0].shape[0]) if inputs[0].ndim else 1


def _adds_up(file: OnnxFile, runs: Sequence[Values]) -> bool:
    """Whether two examples together give what each gives alone."""
    return all(
        _stacked(*(run.get(entry.name) for run in runs)) or entry.name not in runs[0]
        for entry in file.model.graph.output
    )


def _stacked(first: Any, second: Any, both: Any) -> bool:
    if not all(hasattr(value, "shape") and value.ndim for value in (first, second, both)):
        return False
    if first.shape[0] + second.shape[0] != both.shape[0] or first.shape[1:] != both.shape[1:]:
        return False
    half = first.shape[0]
    return close(first, both[:half], loose=True) and close(second, both[half:], loose=True)


def _same(built: Built, inputs: Inputs, run: Values, scales: Mapping[str, float]) -> bool:
    with torch.no_grad():
        found = built.module(*inputs)
    return all(
        close(run[name], tensor.numpy(), loose=True, least=scales.get(name, 0.0)) for name, tensor in found.items()
    )


def _takes_both(built: Built, batches: Sequence[Inputs], runs: Sequence[Values]) -> bool:
    """Whether the module gives for two examples together what the graph, which takes one alone, gives for each."""
    if len(runs) < 2 or any(tensor.ndim == 0 for tensor in batches[0]):
        return False
    try:
        with torch.no_grad():
            found = built.module(*batches[2])
    except Exception:  # any operator may hold on to the number of examples
        return False
    return all(_stacked(runs[0][name], runs[1][name], tensor.numpy()) for name, tensor in found.items())


def _module(
    opened: Opened, judged: Judged, built: Built, values: Values, batches: tuple[int | None, int | None]
) -> fx.GraphModule:
    sizes = {name: tuple(value.shape) for name, value in values.items() if hasattr(value, "shape")}
    module = built.module.eval()
    module.meta[INPUT_NAMES] = opened.session.input_names
    module.meta[TRANSLATION] = Translation(
        opened, judged, built.nodes, built.pads, built.opaque, built.blocks_gradients, sizes, *batches
    )
    return module
