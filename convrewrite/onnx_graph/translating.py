"""An ONNX graph -> a module for the pipeline: layers and functions of torch where these compute the same, and regions that
onnxruntime runs where they do not.

Every node is tried on what onnxruntime gave for it in runs of the whole graph, so that no reading of the standard has to be
trusted.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.escaping import one_line
from convrewrite.inputs import INPUT_NAMES, Inputs, varied
from convrewrite.modules import Shared
from convrewrite.onnx_graph.building import Builder, Built
from convrewrite.onnx_graph.example_axis import ExampleAxis
from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.kept import COMPUTED, QUANTISED, WITHOUT_EXAMPLES, dequantised
from convrewrite.onnx_graph.observing import Observer, Values
from convrewrite.onnx_graph.opaque import NAMED
from convrewrite.onnx_graph.opening import Opened
from convrewrite.onnx_graph.outputs import Judged, judged_values
from convrewrite.onnx_graph.trying import close, least_scale
from convrewrite.onnx_graph.views import Constants
from convrewrite.values import some_of

TRANSLATION = "convrewrite.translation"
"""The key of a graph module's ``meta`` under which its Translation stands."""


@dataclass(frozen=True, slots=True, eq=False)
class Translation(Shared):
    """What a module has to do with the graph it was made of.

    Attributes:
        opened: the file, and its session.
        inputs: names of the inputs that the module takes.
        held: the others, which have no axis of examples: they stay as in the example.
        judged: the values that the module gives.
        nodes: positions of the nodes that became convolutions and BatchNorms, by the names of these modules.
        pads: for convolutions, zeros and ``auto_pad`` that stand before them, by name.
        weight_types: ONNX's numbers of the types of weights that nodes compute, by the names of these values.
        refused: why convolutions among these stay, by name.
        counted: whether the first axis of the inputs counts examples, as far as the convolutions tell.
        opaque: operators of the nodes that onnxruntime runs, with how many of each.
        blocks_gradients: whether real numbers go through these.
        sizes: shapes of values in the example run.
        batch: the number of examples that the graph takes; None for any.
        module_batch: the same of the module, which may take any where the graph does not.
    """

    opened: Opened
    inputs: tuple[str, ...]
    held: Mapping[str, Tensor]
    judged: Judged
    nodes: Mapping[str, int]
    pads: Mapping[str, tuple[tuple[int, ...], str]]
    weight_types: Mapping[str, int]
    refused: Mapping[str, str]
    counted: bool
    opaque: Mapping[str, int]
    blocks_gradients: bool
    sizes: Mapping[str, tuple[int, ...]]
    batch: int | None
    module_batch: int | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, a sentence each."""
        notes = [] if self.judged.note is None else [self.judged.note]
        if self.opened.reordered:
            notes.append(
                "nodes stand in the file before others whose values they take; in the result they are in order"
            )
        if self.opaque:
            named = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in self.opaque.items())
            ends = "; gradients end there: of sites before them all output channels count alike where no other way leads on"
            notes.append(f"run by onnxruntime itself: {named}{ends if self.blocks_gradients else ''}")
        if self.held:
            names = ", ".join(
                f"{name} ({'x'.join(map(str, value.shape)) or 'a number'})" for name, value in self.held.items()
            )
            notes.append(f"inputs without an axis of examples stay as in the example input: {names}")
        if self.batch is not None and self.counted:
            many = f"{self.batch} example{'s' if self.batch > 1 else ''} at a time"
            alike = f"the graph is run on {many}, as not every output has one row along its first axis for each example"
            notes.append(f"the graph takes {many}" if self._states_number else alike)
        return tuple(notes)

    @property
    def _states_number(self) -> bool:
        """Whether the graph itself states how many examples it takes, rather than any number."""
        shapes = dict(zip(self.opened.session.input_names, self.opened.session.input_shapes, strict=True))
        return any(isinstance(size, int) for name in self.inputs for size in shapes[name][:1])


def translation_of(model: object) -> Translation | None:
    """That of a module made of an ONNX graph; None for other models."""
    found: Translation | None = getattr(model, "meta", {}).get(TRANSLATION)
    return found


def is_graph(model: object) -> bool:
    """Whether a module was made of an ONNX graph."""
    return translation_of(model) is not None


def source_of_graph(model: object) -> str | None:
    """What the file that a module was made of is called in messages; None for models that were not made of a graph."""
    translation = translation_of(model)
    return None if translation is None else translation.opened.file.source


def batch_of(model: object) -> int | None:
    """How many examples a module made of an ONNX graph takes at a time; None for any number, and for other models."""
    translation = translation_of(model)
    return None if translation is None else translation.module_batch


def graph_inputs(model: object) -> tuple[str, ...]:
    """The names of all inputs of the graph that a module was made of, even those that the module does not take; none for other
    models."""
    translation = translation_of(model)
    return () if translation is None else tuple(translation.opened.session.input_names)


def translate(opened: Opened, inputs: Inputs) -> fx.GraphModule:
    """The graph as a module that takes tensors in the order of its inputs and gives its outputs by their names.

    Raises ModelLoadError for a graph whose nodes together give something else than the graph does in onnxruntime.
    """
    named = dict(zip(opened.session.input_names, inputs, strict=True))
    own, held = ExampleAxis.of(opened.file.model).divided(named)
    constants = Constants(opened.file, own, held)
    runs = _observed(opened, own, held)
    counted = _counts_examples(opened.file, constants.names, _length(own), runs)
    ends = [entry.name for entry in opened.file.model.graph.output if entry.name not in constants.names]
    batch = None if len(runs) == 3 and _adds_up(ends, runs) else _length(own)
    runs = runs if batch is None else runs[:2]
    constants.learn(runs[0])
    judged = judged_values(opened.file.model.graph, constants.names, runs[:2])
    if not judged.names:
        raise UsageError(
            f"{opened.file.source}: expected outputs that hang on the inputs, found none; nothing can be judged"
        )
    feeds = _batches(tuple(own.values()))
    # The first one again: random numbers repeat themselves from session to session, but not from call to call.
    checks = [*zip(feeds, runs, strict=False), (feeds[0], runs[0])]
    scales = {name: least_scale(node.op_type) for node in opened.file.model.graph.node for name in node.output}
    fault: str | None = None
    for with_operators in (True, False):
        built = Builder(opened, constants, runs, tuple(own)).build(judged.names, with_operators)
        fault = _fault(built, checks, scales)
        if fault is None:
            takes_any = batch is None or _takes_both(built, feeds, runs)
            sizes = {name: tuple(value.shape) for name, value in runs[0].items() if hasattr(value, "shape")}
            made = Translation(
                opened, tuple(own), held, judged, built.nodes, built.pads, _weight_types(opened.file, constants, built),
                _refused(opened.file, constants, built, counted), counted, built.opaque, built.blocks_gradients, sizes, batch,
                None if takes_any else batch,
            )  # fmt: skip
            built.module.meta |= {INPUT_NAMES: made.inputs, TRANSLATION: made}
            return built.module.eval()
    raise ModelLoadError(
        f"{opened.file.source}: expected that its nodes one by one give what the whole graph gives in onnxruntime, found {fault}"
    )


def _batches(inputs: Inputs) -> list[Inputs]:
    """The example, other numbers, and both together."""
    other = varied(inputs)
    return [inputs, other, tuple(torch.cat([a, b]) if a.ndim else a for a, b in zip(inputs, other, strict=True))]


def _length(own: Mapping[str, Tensor]) -> int:
    """How many examples there are, by the first input."""
    first = next(iter(own.values()))
    return int(first.shape[0]) if first.ndim else 1


def _observed(opened: Opened, own: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> list[Values]:
    """The values of all nodes for those of the three batches that the graph takes."""
    inputs = tuple(own.values())
    # In a process of its own first, as it may not end.
    given = [(dict(own) | dict(held))[name] for name in opened.session.input_names]
    opened.session(*given)
    names = [name for node in opened.file.model.graph.node for name in node.output if name]
    observer = Observer(opened.file, dict.fromkeys(names))
    observer.try_out(given, opened.seconds)
    runs: list[Values] = []
    for batch in _batches(inputs):
        feed = {name: tensor.numpy() for name, tensor in (*zip(own, batch, strict=True), *held.items())}
        found = observer.run(feed, opened.seconds)
        if found is not None:
            runs.append(feed | found)
        elif not runs:
            raise ModelLoadError(
                f"{opened.file.source}: onnxruntime cannot run it on the example; give another with --input"
            )
        else:
            break
    return runs


def _counts_examples(file: OnnxFile, constants: Collection[str], examples: int, runs: Sequence[Values]) -> bool:
    """Whether the first axis of the inputs counts examples: some convolution has more rows for more of them, or, where the graph
    takes so many only, one or several for each. Without convolutions that tell, it does."""
    nodes = [node for node in file.model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    names = [node.output[0] for node in nodes if node.output[0] not in constants]
    shapes = [tuple(run[name].shape for run in (runs[0], runs[-1])) for name in names if name in runs[0]]
    if len(runs) == 3:
        return not shapes or any(one[:1] != both[:1] for one, both in shapes)
    return not shapes or any(one[0] % examples == 0 for one, _ in shapes)


def _adds_up(outputs: Sequence[str], runs: Sequence[Values]) -> bool:
    """Whether two examples together give what each gives alone."""
    return all(_stacked(*(run.get(name) for run in runs)) or name not in runs[0] for name in outputs)


def _stacked(first: Any, second: Any, both: Any) -> bool:
    if not all(hasattr(value, "shape") and value.ndim for value in (first, second, both)):
        return False
    if first.shape[0] + second.shape[0] != both.shape[0] or first.shape[1:] != both.shape[1:]:
        return False
    half = first.shape[0]
    return close(first, both[:half], loose=True) and close(second, both[half:], loose=True)


def _fault(built: Built, checks: Sequence[tuple[Inputs, Values]], scales: Mapping[str, float]) -> str | None:
    """What is wrong with a module, and what to do; None where it gives what the graph gave. Raises ModelLoadError for one that
    does not end."""
    try:
        if all(_same(built, feed, run, scales) for feed, run in checks):
            return None
    except ModelLoadError:
        raise
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        named = some_of(list(built.opaque), NAMED)
        return (
            f"that what onnxruntime runs of them ({named}) does not run apart from the rest: {one_line(error, 300)}; graphs "
            "inside of nodes may need sizes that are stated in the file: export it with fixed sizes"
        )
    return "otherwise; a node may give other values at every call: take it out, or export the graph again"


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


def _refused(file: OnnxFile, constants: Constants, built: Built, counted: bool) -> dict[str, str]:
    """The convolutions whose weights are whole numbers in the file, or whose weights or biases depend on inputs that are held; or
    all, where no axis of the inputs counts examples."""
    whole = dequantised(file)
    refused: dict[str, str] = {}
    for name, node in _convolutions(file, built):
        if constants.from_held & set(node.input[1:]):
            refused[name] = COMPUTED
        elif node.input[1] in whole:
            refused[name] = QUANTISED
        elif not counted:
            refused[name] = WITHOUT_EXAMPLES
    return refused


def _weight_types(file: OnnxFile, constants: Constants, built: Built) -> dict[str, int]:
    """The types of computed weights, which cannot always be inferred: operators of other domains compute weights too."""
    computed = {node.input[1] for _, node in _convolutions(file, built) if constants.initialiser(node.input[1]) is None}
    return {name: onnx.helper.np_dtype_to_tensor_dtype(constants.array(name).dtype) for name in computed}


def _convolutions(file: OnnxFile, built: Built) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Those that became layers: their names there, and their nodes."""
    for name, index in built.nodes.items():
        node = file.model.graph.node[index]
        if node.op_type in ("Conv", "ConvTranspose"):
            yield name, node
