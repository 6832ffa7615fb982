"""The model that a command was given, with one example for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from convrewrite.cli import example_inputs
from convrewrite.cli.known_sizes import sizes_of
from convrewrite.cli.options import Sources, load
from convrewrite.errors import UsageError
from convrewrite.inputs import Inputs, require_common_batch
from convrewrite.onnx_graph import ExampleAxis, open_onnx, read_network


@dataclass(frozen=True, slots=True)
class GivenNetwork:
    """A model, one example, and what was assumed on the way, a sentence each."""

    model: nn.Module
    inputs: Inputs
    notes: Sequence[str]


def given_network(
    source: str, sources: Sources, trust: bool, seconds: float, result: str | Path | None = None
) -> GivenNetwork:
    """The model in a file, be it of PyTorch or ONNX, or from a program; an ONNX file has ``seconds`` to open, and to run once.
    ``result``: a folder whose report states the sizes of its inputs, where nothing else does.

    Raises ModelLoadError, UsageError.
    """
    shapes, known = sources.input or (), sizes_of(source, *([] if result is None else [result]))
    if Path(source).suffix.lower() != ".onnx":
        loaded = load(source, sources.factory, trust)
        inputs, notes = example_inputs.for_model(loaded, shapes, sources.data, known)
        return GivenNetwork(loaded.model, inputs, (*loaded.notes, *notes))
    if sources.factory is not None:
        raise UsageError(
            f"--factory: expected with a file of weights, but {source} holds its network itself; leave it out"
        )
    opened = open_onnx(source, trust=trust, seconds=seconds)
    of_examples = ExampleAxis.of(opened.file.model).names
    example, notes = example_inputs.for_graph(opened.session, shapes, sources.data, known, of_examples=of_examples)
    network = read_network(opened, example)
    require_common_batch(network.inputs)
    return GivenNetwork(network.module, network.inputs, (*network.notes, *notes))
