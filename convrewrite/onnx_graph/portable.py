"""A module that was made of an ONNX graph, as values from which another process can make it again."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from torch import Tensor, nn

from convrewrite.errors import UsageError
from convrewrite.inputs import Inputs
from convrewrite.onnx_graph.external import locations
from convrewrite.onnx_graph.network import Network, read_network
from convrewrite.onnx_graph.translating import translation_of


@dataclass(frozen=True, slots=True)
class PortableGraph:
    """The file's bytes, and the example by the graph's names."""

    file: bytes
    example: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, inputs: Inputs) -> "PortableGraph | None":
        """None for a module that was not made of a graph. Raises UsageError for weights in other files."""
        translation = translation_of(module)
        if translation is None:
            return None
        file = translation.opened.file
        if locations(file.model):
            raise UsageError(
                f"{file.source}: expected weights in the file itself, so that it can be sent, found some in files beside it; "
                "sweep without a cluster"
            )
        example = {**translation.held, **dict(zip(translation.inputs, inputs, strict=True))}
        return cls(file.model.SerializeToString(deterministic=True), example)

    def network(self, seconds: float) -> Network:
        """The module, made again; ``seconds`` as in :func:`convrewrite.onnx_graph.read_network`. Raises ModelLoadError."""
        return read_network(onnx.load_from_string(self.file), dict(self.example), seconds=seconds)
