"""From a file to a module with an example input, in one step."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import fx, nn

from convrewrite.conv import NO_CONVOLUTION, Cost, classify
from convrewrite.errors import ModelLoadError, TraceError
from convrewrite.graph import Site
from convrewrite.inputs import ExampleInput, Inputs
from convrewrite.onnx_files import require_well_behaved, tensors
from convrewrite.onnx_graph.examples import example_of_graph
from convrewrite.onnx_graph.kept import KeptConv, kept_convolutions
from convrewrite.onnx_graph.opaque import Region
from convrewrite.onnx_graph.opening import Opened, open_onnx
from convrewrite.onnx_graph.ordering import leading_to, makers_of
from convrewrite.onnx_graph.stored import NORM, parameters_stored, stored_in_functions
from convrewrite.onnx_graph.translating import Translation, translate, translation_of
from convrewrite.onnx_graph.views import names_used
from convrewrite.onnx_graph.walks import uses_inside, uses_of
from convrewrite.state import parameters_of
from convrewrite.values import PROBE_SECONDS

HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True, slots=True)
class Network:
    """A module made of a graph, one example for it, and what was assumed, a sentence each."""

    module: fx.GraphModule
    inputs: Inputs
    notes: tuple[str, ...]


def read_network(
    source: str | Path | onnx.ModelProto | Opened,
    example: ExampleInput | None = None,
    *,
    seconds: float = PROBE_SECONDS,
) -> Network:
    """The network in an ONNX file or model. ``example``: a tensor, a tuple, or a dictionary by the graph's input names, for all
    inputs or some; the others are made as the graph states them.

    ``seconds`` is as in :func:`convrewrite.onnx_graph.open_onnx`. Raises ModelLoadError, UsageError.
    """
    opened = source if isinstance(source, Opened) else open_onnx(source, seconds=seconds)
    if not opened.session.input_names:
        raise ModelLoadError(
            f"{opened.file.source}: expected a graph with inputs, found none; there is nothing to run it on"
        )
    inputs, notes = example_of_graph(opened.session, example)
    module = translate(opened, inputs)
    translation = translation_of(module)
    assert translation is not None, "it was just made"
    own = tuple(
        tensor for name, tensor in zip(opened.session.input_names, inputs, strict=True) if name in translation.inputs
    )
    unlisted = _unlisted(_kept(translation))
    if unlisted:
        told = "convolutions whose geometry the file does not tell stay, neither listed nor counted as MACs"
        notes = (*notes, f"{told}: {unlisted}")
    return Network(module, own, (*notes, *translation.notes, *_shared(translation, module)))


def kept_sites(model: nn.Module) -> tuple[Site, ...]:
    """Convolutions of a graph that are no part of the module made of it, with the reason; none for other models.

    Raises TraceError for a graph without a convolution, and for one all of whose convolutions have a geometry that is not known:
    none is a site.
    """
    translation = translation_of(model)
    if translation is None:
        return ()
    kept = _kept(translation)
    known = tuple(_site(one) for one in kept if one.spec)
    if not known and not any(_convolves(translation, index) for index in translation.nodes.values()):
        reason = f"expected convolutions that can be rewritten, found {_unlisted(kept)}" if kept else NO_CONVOLUTION
        raise TraceError(f"{translation.opened.file.source}: {reason}")
    return known


def _convolves(translation: Translation, index: int) -> bool:
    return translation.opened.file.model.graph.node[index].op_type != NORM


def _unlisted(kept: Sequence[KeptConv]) -> str:
    """How many there are of each operator, and why they stay."""
    counts = Counter((one.op_type, one.reason) for one in kept if one.spec is None)
    return "; ".join(f"{count} {operator}: {reason}" for (operator, reason), count in counts.items())


def hidden_cost(model: nn.Module) -> Cost:
    """What a graph costs beyond the module made of it: weights that regions and operators hold, MACs of what is kept in them.

    All real numbers that the file stores are parameters, wherever they are, except statistics of BatchNorms. Weights that layers
    share are in the file once, and in the module once for each layer, as each may be rewritten alone; those that other nodes use
    too count once more, as they stay for these.
    """
    translation = translation_of(model)
    if translation is None:
        return Cost()
    macs = sum(site.cost.macs for site in kept_sites(model))
    return Cost(max(0, _unseen(translation, model) + _staying(translation)), macs)


def _unseen(translation: Translation, model: nn.Module) -> int:
    """How many numbers the file stores that are no parameters of the module; negative where it computes some of these."""
    model_proto = translation.opened.file.model
    graph = model_proto.graph
    stored = sum(parameters_stored(graph).values()) + stored_in_functions(model_proto)
    own = sum(parameter.numel() for parameter in parameters_of(model)) - _repeated(translation, model)
    return stored - own


def _staying(translation: Translation) -> int:
    """How many numbers of layers' weights would stay in the file were all layers rewritten, as other nodes use them too."""
    graph = translation.opened.file.model.graph
    stored = parameters_stored(graph)
    uses, makers = uses_of(translation.opened.file.model), makers_of(graph)
    layers = [graph.node[index] for name, index in translation.nodes.items() if name not in translation.refused]
    waiting = [name for node in layers for name in node.input[1:] if name]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        uses[name] -= 1
        if uses[name] == 0 and name in makers:
            maker = graph.node[makers[name]]
            waiting += filter(None, [*maker.input, *uses_inside(maker).elements()])
    left = {name for name in seen if uses[name] > 0}
    behind = (graph.node[index] for index in leading_to(graph, makers, left))  # what computes them stays, too
    return sum(stored.get(name, 0) for name in left.union(*map(names_used, behind)))


def _shared(translation: Translation, model: nn.Module) -> tuple[str, ...]:
    """Notes on weights that count more than once, where there are any."""
    more, unseen = _repeated(translation, model), _unseen(translation, model)
    staying = max(0, unseen + _staying(translation)) - max(0, unseen)
    notes = []
    if more:
        notes.append(
            "layers of the graph share weights, which count as parameters of each, as each may be rewritten alone: "
            f"{more:,} more than are in the file, where they stay for those that are kept"
        )
    if staying:
        notes.append(
            "other nodes of the graph use weights of layers too, which count once more, as they stay for these if a layer is "
            f"rewritten: {staying:,} more than are in the file"
        )
    return tuple(notes)


def _repeated(translation: Translation, model: nn.Module) -> int:
    """How many numbers of the module's weights and biases are shared with another layer, counted before, in the graph."""
    nodes = translation.opened.file.model.graph.node
    sizes: dict[str, list[int]] = {}
    for name, index in translation.nodes.items():
        layer = model.get_submodule(name)
        for kind, source in zip(("weight", "bias"), nodes[index].input[1:3], strict=False):
            if source and isinstance(held := getattr(layer, kind, None), nn.Parameter):
                sizes.setdefault(source, []).append(held.numel())
    return sum(sum(found[1:]) for found in sizes.values())


def refused_sites(model: nn.Module) -> Mapping[str, str]:
    """Convolutions of a module made of a graph that stay, by name, with the reason; none for other models."""
    translation = translation_of(model)
    return {} if translation is None else translation.refused


def holds_halves(model: nn.Module) -> bool:
    """Whether the graph that a module was made of has numbers in half precision; the module itself computes in float32."""
    translation = translation_of(model)
    if translation is None:
        return False
    return any(tensor.data_type in HALVES for tensor in tensors(translation.opened.file.model))


def regions_of(model: nn.Module) -> tuple[str, ...]:
    """The operators that onnxruntime runs in a module made of a graph, through which no gradient passes; none for others."""
    if translation_of(model) is None:
        return ()
    found = [operator for part in model.modules() if isinstance(part, Region) for operator in part.operators]
    return tuple(dict.fromkeys(found))


def require_end(model: nn.Module, batches: Sequence[Inputs]) -> None:
    """Raise ModelLoadError unless onnxruntime runs the graph that ``model`` was made of on the first of the batches within its
    limits, in a process of its own: what a graph does on one example, it need not do on many. Other models pass, and graphs
    of which onnxruntime runs no part in the module, as nothing in these can go on for ever."""
    translation = translation_of(model)
    if translation is None or not translation.opaque or not batches:
        return
    opened, count = translation.opened, translation.batch
    own = {name: tensor[:count] for name, tensor in zip(translation.inputs, batches[0], strict=True)}
    given = [(own | dict(translation.held))[name] for name in opened.session.input_names]
    require_well_behaved(opened.path, opened.seconds, given, source=opened.file.source)


def _kept(translation: Translation) -> tuple[KeptConv, ...]:
    shape = translation.sizes[translation.inputs[0]]
    return kept_convolutions(
        translation.opened.file, translation.sizes, translation.nodes.values(), translation.judged.names,
        max(1, math.prod(shape[:1])), translation.held, translation.nodes,
    )  # fmt: skip


def _site(kept: KeptConv) -> Site:
    assert kept.spec is not None
    return Site(kept.name, classify(kept.spec), kept.spec, kept.input_sizes, refusal=kept.reason)
