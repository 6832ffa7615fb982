"""Whether a rewritten ONNX file differs from the original only where convolutions were replaced."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

REPLACED = ("Conv", "ConvTranspose")
"""Operators whose nodes a rewriting may take out."""

FOLDED = "BatchNormalization"
"""Operator whose node goes with the convolution before it, into which it is folded."""


def differences(before: onnx.ModelProto, after: onnx.ModelProto, rewritten: int) -> list[str]:
    """What differs besides ``rewritten`` convolutions, what they alone read, and what was put in their places.

    Nodes are compared byte for byte and in their order, initialisers byte for byte, and of the file all but its graph. Both
    models have their weights loaded, also those from files of their own.
    """
    gone = missing_nodes(before.graph, after.graph)
    taken = [node for node in gone if node.op_type in REPLACED]
    found = [] if len(taken) == rewritten else [f"{len(taken)} convolutions went, {rewritten} were rewritten"]
    found += [f"node {node.op_type} {node.name} went" for node in unexplained(before.graph, gone)]
    found += initialiser_differences(before.graph, after.graph, gone)
    if not in_order(kept_nodes(before.graph, gone), after.graph.node):
        found.append("the nodes that stayed are in another order")
    return found + frame_differences(before, after)


def missing_nodes(before: onnx.GraphProto, after: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that the second graph does not have as they were."""
    left = Counter(node.SerializeToString(deterministic=True) for node in after.node)
    missing = []
    for node in before.node:
        key = node.SerializeToString(deterministic=True)
        if left[key]:
            left[key] -= 1
        else:
            missing.append(node)
    return missing


def kept_nodes(graph: onnx.GraphProto, gone: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    missing = {id(node) for node in gone}
    return [node for node in graph.node if id(node) not in missing]


def unexplained(graph: onnx.GraphProto, gone: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Missing nodes that are neither convolutions, nor norms after these, nor nodes that only made their weights."""
    convolved = {name for node in gone if node.op_type in REPLACED for name in node.output}
    replaced = [
        node for node in gone if node.op_type in REPLACED or (node.op_type == FOLDED and node.input[0] in convolved)
    ]
    taken = {id(node) for node in replaced}
    read = {value.name for value in graph.output} | {node.input[0] for node in replaced}
    read |= {name for node in kept_nodes(graph, gone) for name in names_in(node)}
    rest = [node for node in gone if id(node) not in taken]
    return [node for node in rest if read & set(node.output)]


def names_in(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, its bodies included."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from names_in(inner)
            yield from (value.name for value in body.output)


def initialiser_differences(
    before: onnx.GraphProto, after: onnx.GraphProto, gone: Sequence[onnx.NodeProto]
) -> list[str]:
    """Initialisers that changed, or went although a node that stayed reads them."""
    kept = {tensor.name: tensor for tensor in after.initializer}
    free = {name for node in gone for name in node.input}
    read = {name for node in kept_nodes(before, gone) for name in names_in(node)}
    found = []
    for tensor in before.initializer:
        if tensor.name not in kept:
            if tensor.name in read or tensor.name not in free:
                found.append(f"initialiser {tensor.name} went")
        elif tensor.SerializeToString(deterministic=True) != kept[tensor.name].SerializeToString(deterministic=True):
            found.append(f"initialiser {tensor.name} changed")
    return found


def in_order(few: Sequence[onnx.NodeProto], many: Sequence[onnx.NodeProto]) -> bool:
    """Whether ``many`` is ``few`` with others between them."""
    rest = iter(node.SerializeToString(deterministic=True) for node in many)
    return all(node.SerializeToString(deterministic=True) in rest for node in few)


def frame_differences(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """Differences of inputs, outputs, operator versions, functions and whatever else the file says of itself.

    Missing inputs do not count where they were initialisers of what was taken out; operator versions and notes may be added.
    """
    kept = {tensor.name for tensor in after.graph.initializer}
    weights = {tensor.name for tensor in before.graph.initializer}
    given = [value for value in before.graph.input if value.name in kept or value.name not in weights]
    found = []
    if [value.SerializeToString() for value in given] != [
        value.SerializeToString() for value in after.graph.input if value.name not in kept or value.name in weights
    ]:
        found.append("inputs differ")
    if serialised(before.graph.output) != serialised(after.graph.output):
        found.append("outputs differ")
    if serialised(before.functions) != serialised(after.functions):
        found.append("functions differ")
    if before.ir_version != after.ir_version:
        found.append(f"the IR version was {before.ir_version} and is {after.ir_version}")
    lost = [entry for entry in before.opset_import if entry not in after.opset_import]
    found += [f"operators of {entry.domain or 'ai.onnx'} {entry.version} went" for entry in lost]
    lost_notes = [entry for entry in before.metadata_props if entry not in after.metadata_props]
    return found + [f"the note {entry.key} went or changed" for entry in lost_notes]


def serialised(messages: Sequence[onnx.ValueInfoProto] | Sequence[onnx.FunctionProto]) -> list[bytes]:
    return [message.SerializeToString(deterministic=True) for message in messages]


def differences_of_files(before: Path, after: Path, rewritten: int) -> list[str]:
    """:func:`differences` of two files, with the weights beside them."""
    return differences(whole(before), whole(after), rewritten)


def whole(path: Path) -> onnx.ModelProto:
    """The model with its weights, which no longer say where they were stored."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")
    return model
