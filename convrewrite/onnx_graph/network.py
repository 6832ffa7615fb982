"""From a file to a module with an example input, in one step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import fx, nn

from convrewrite.conv import Cost, classify
from convrewrite.errors import ModelLoadError
from convrewrite.graph import Site
from convrewrite.inputs import ExampleInput, Inputs
from convrewrite.machine import PROBE_SECONDS
from convrewrite.onnx_files import require_well_behaved, tensors
from convrewrite.onnx_graph.examples import example_of_graph
from convrewrite.onnx_graph.kept import KeptConv, kept_convolutions
from convrewrite.onnx_graph.opaque import Region
from convrewrite.onnx_graph.opening import Opened, open_onnx
from convrewrite.onnx_graph.translating import Translation, translate, translation_of

HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


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
    return Network(module, own, (*notes, *translation.notes, *_shared(translation, module)))


def kept_sites(model: nn.Module) -> tuple[Site, ...]:
    """Convolutions of a graph that are no part of the module made of it, with the reason; none for other models."""
    translation = translation_of(model)
    return () if translation is None else tuple(_site(kept) for kept in _kept(translation) if kept.spec)


def hidden_cost(model: nn.Module) -> Cost:
    """What a graph costs beyond the module made of it: weights that regions and operators hold, MACs of what is kept in them.

    Weights that layers share are in the file once, and in the module once for each layer, as each may be rewritten alone.
    """
    translation = translation_of(model)
    if translation is None:
        return Cost()
    graph = translation.opened.file.model.graph
    stored = sum(_numbers(one) for one in graph.initializer if one.data_type in FLOATS)
    own = sum(parameter.numel() for parameter in model.parameters()) - _repeated(translation, model)
    buffers = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    macs = sum(site.cost.macs for site in kept_sites(model))
    return Cost(max(0, stored - own - buffers), macs)


def _shared(translation: Translation, model: nn.Module) -> tuple[str, ...]:
    """A note on weights that count more than once, where there are any."""
    more = _repeated(translation, model)
    if not more:
        return ()
    return (
        "layers of the graph share weights, which count as parameters of each, as each may be rewritten alone: "
        f"{more:,} more than are in the file, where they stay for those that are kept",
    )


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
    return kept_convolutions(
        translation.opened.file, translation.sizes, translation.nodes.values(), translation.judged.names
    )


def _site(kept: KeptConv) -> Site:
    assert kept.spec is not None
    return Site(kept.name, classify(kept.spec), kept.spec, kept.input_sizes, refusal=kept.reason)


def _numbers(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)
