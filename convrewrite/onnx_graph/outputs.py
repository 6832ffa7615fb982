"""The values of a graph by which a result is judged: its outputs or, where these are chosen detections, what the choice is made
from. How many are chosen depends on the numbers, so that the outputs of two models cannot be compared one by one."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from convrewrite.onnx_graph.observing import Values
from convrewrite.onnx_graph.views import names_used
from convrewrite.onnx_graph.walks import inner_graphs

SELECTS = "NonMaxSuppression"
FINDS = ("NonZero", "Unique", "Compress")
"""The operator that chooses detections, and others for which the numbers decide how many entries the output has."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Names of the values, and a sentence where they are not the graph's own outputs."""

    names: tuple[str, ...]
    note: str | None = None


def judged_values(graph: onnx.GraphProto, constants: Collection[str], runs: Sequence[Values]) -> Judged:
    """The values by which a graph is judged; ``runs``: what it gave for several inputs of the same shapes."""
    makers = {name: node for node in graph.node for name in node.output if name}
    names: list[str] = []
    cut: list[str] = []
    for entry in graph.output:
        if entry.name in constants:
            continue  # it is the same in every model
        choosers = [node for node in _ancestors(entry.name, makers) if _chooses(node, _varies(entry.name, runs))]
        if choosers:
            cut.append(entry.name)
            names += [name for node in choosers for name in _chosen_from(node, makers, constants, runs)]
        else:
            names.append(entry.name)
    if not cut:
        return Judged(tuple(names))
    shown = ", ".join(dict.fromkeys(names))
    return Judged(
        tuple(dict.fromkeys(names)),
        f"how many entries {', '.join(cut)} has depends on the numbers (detections are chosen): fidelity is measured on what "
        f"the choice is made from, {shown}",
    )


def _ancestors(name: str, makers: Mapping[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes that lead to a value, each once, back to the nearest choice: those beyond lead to what that chooses from."""
    waiting, seen = [name], set()
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if not _chooses(node, varies=True):
            waiting += names_used(node)


def _chooses(node: onnx.NodeProto, varies: bool) -> bool:
    """Whether a node, or one inside of it, chooses."""
    if node.op_type == SELECTS or (varies and node.op_type in FINDS):
        return True
    return any(_chooses(inner, varies) for graph in inner_graphs(node) for inner in graph.node)


def _chosen_from(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], constants: Collection[str], runs: Sequence[Values]
) -> Iterator[str]:
    """The values that a node chooses from: in place of masks, and of what was chosen before, the values that led to them."""
    waiting, seen = list(names_used(node)), set(constants)
    while waiting:
        name = waiting.pop(0)
        if name in seen or name not in makers:
            continue
        seen.add(name)
        if _varies(name, runs) or _is_mask(name, runs):
            waiting += names_used(makers[name])
        elif _usable(name, makers, constants, runs):
            yield name


def _is_mask(name: str, runs: Sequence[Values]) -> bool:
    return getattr(runs[0].get(name), "dtype", None) == np.bool_


def _varies(name: str, runs: Sequence[Values]) -> bool:
    """Whether the numbers decide how many entries a value has, as is assumed of a value without entries."""
    shapes = [run[name].shape for run in runs if isinstance(run.get(name), np.ndarray)]
    return len(set(shapes)) > 1 or any(0 in shape for shape in shapes)


def _usable(
    name: str, makers: Mapping[str, onnx.NodeProto], constants: Collection[str], runs: Sequence[Values]
) -> bool:
    """Whether a value consists of real numbers that depend on the inputs."""
    value = runs[0].get(name)
    real = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size > 0
    return name in makers and name not in constants and real
