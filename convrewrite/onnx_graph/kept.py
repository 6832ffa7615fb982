"""Stub."""

from collections.abc import Mapping
from dataclasses import dataclass

from convrewrite.conv import ConvSpec, Size
from convrewrite.onnx_graph.file import OnnxFile


@dataclass(frozen=True, slots=True)
class Kept:
    name: str
    op_type: str
    spec: ConvSpec | None
    input_sizes: tuple[Size, ...]
    reason: str


def kept_convolutions(file: OnnxFile, sizes: Mapping[str, tuple[int, ...]]) -> tuple[Kept, ...]:
    return ()
