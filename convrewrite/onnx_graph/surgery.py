"""The user's graph with rewritten convolutions in it: everything else stays as it came, byte for byte.

Nothing is exported anew. The new nodes stand where the old ones stood, and give values of the old names; old weights that
nothing else uses are removed.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx

from convrewrite.errors import ExportError, UsageError, VerificationError
from convrewrite.escaping import one_line
from convrewrite.folders import Scratch, write_errors
from convrewrite.onnx_files import OnnxModel, Provenance, new_name_of_weights, place
from convrewrite.onnx_graph.emission import DTYPES, ConvModule, Emitter, Margin
from convrewrite.onnx_graph.external import locations, move_out, needs_second_file
from convrewrite.onnx_graph.file import OnnxFile, Replacement
from convrewrite.onnx_graph.scopes import inferred_types
from convrewrite.onnx_graph.walks import STANDARD_DOMAINS, Names, alone_uses, uses_inside, uses_of
from convrewrite.values import some_of

INITIALISERS_ARE_INPUTS = 4
"""Version of ONNX's format below which every initialiser is an input of the graph, too."""

NAMED = 3
"""Most inputs that a note names."""

FAULT_LENGTH = 300
"""Most characters that are shown of what a checker says: it may quote whole shapes."""


def write_rewritten(
    file: OnnxFile,
    replacements: Sequence[Replacement],
    path: Path,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Write a copy of ``file`` in which each replacement stands in the place of its convolution; returns notes.

    Weights that lay in other files are copied to a second file beside ``path``; then new weights go there too. All go there if
    one file cannot hold them. ``metadata`` goes into ``metadata_props``. The result is checked, as far as the original passes
    the checks, and opened in onnxruntime; it appears only when complete.

    Raises ExportError for a replacement that does not fit its place, and for a result that cannot be used; ModelLoadError
    where the original's weights are missing; UsageError if ``path`` cannot be written, or belongs to the original.
    """
    _require_another_place(file, path)
    model, fresh = rewritten(file, replacements)
    Provenance.restate(model, metadata)
    notes = _lost_inputs(file.model, model)
    with write_errors(path), Scratch(path.parent) as scratch:
        folder = scratch.path / "draft"
        folder.mkdir()
        draft = folder / path.name
        if needs_second_file(model):
            move_out(model, file, fresh, folder / new_name_of_weights(draft))
            notes.append(f"weights stand in a second file, {path.name}.*.data")
        draft.write_bytes(model.SerializeToString())
        notes += _checked(draft, file)
        place(draft, path)
    return tuple(notes)


def rewritten(file: OnnxFile, replacements: Sequence[Replacement]) -> tuple[onnx.ModelProto, set[str]]:
    """A copy of the model with the replacements in it, and the names of the new initialisers.

    Raises ExportError for a replacement that does not fit its place.
    """
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    operation = _Operation.on(model, file)
    for replacement in replacements:
        operation.replace(replacement)
    operation.finish()
    return model, {tensor.name for tensor in operation.emitter.initialisers}


def names_of_weights(file: OnnxFile, replacements: Sequence[Replacement]) -> Mapping[int, str]:
    """The ids of the tensors in these replacements -> the initialisers that hold them in a graph that :func:`write_rewritten`
    made of these replacements, or of others of the same shapes. Raises ExportError."""
    operation = _Operation.on(file.model, file)
    for replacement in replacements:
        operation.replace(replacement)
    return operation.emitter.names


@dataclass(slots=True)
class _Operation:
    """Surgery under way: the model is only read until everything is decided, and then changed in one go."""

    model: onnx.ModelProto
    source: str
    emitter: Emitter
    nodes: list[onnx.NodeProto]
    uses: dict[str, int]
    makers: dict[str, int]
    initialisers: dict[str, int]
    in_place: dict[int, list[onnx.NodeProto]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    inferred: dict[str, int] = field(default_factory=dict)

    @classmethod
    def on(cls, model: onnx.ModelProto, file: OnnxFile) -> "_Operation":
        """Surgery that has not begun. ``initialisers``: their types, by name; ``makers``: the node that makes each value."""
        graph = model.graph
        nodes = list(graph.node)
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        types |= {sparse.values.name: sparse.values.data_type for sparse in graph.sparse_initializer}
        return cls(
            model, file.source, Emitter(Names(model), file.opset, file.source), nodes, defaultdict(int, uses_of(model)),
            {name: number for number, node in enumerate(nodes) for name in node.output if name}, types,
        )  # fmt: skip

    def replace(self, replacement: Replacement) -> None:
        """Decide on one convolution: its new nodes, and what is removed."""
        conv = self._conv(replacement)
        name = conv.name or conv.output[0]
        norm = None if replacement.batch_norm is None else self._batch_norm(replacement, conv)
        target = conv.output[0] if norm is None else norm.output[0]
        self._require_channels(conv, self.emitter.chains(replacement.module, name))
        self.in_place[replacement.node] = self.emitter.nodes(
            replacement.module,
            conv.input[0],
            target,
            name,
            Margin(replacement.pads, replacement.auto_pad),
            replacement.weight_type or self._type_of_weights(conv),
        )
        self._drop(replacement.node, list(conv.input[1:]))
        if norm is not None and replacement.batch_norm is not None:
            self.unused.add(conv.output[0])
            self._drop(replacement.batch_norm, list(norm.input[1:]))

    def finish(self) -> None:
        """Change the model."""
        graph = self.model.graph
        self._rebuild(graph)
        for table in (graph.initializer, graph.input, graph.value_info):
            _remove(table, [number for number, entry in enumerate(table) if entry.name in self.unused])
        sparse = [number for number, entry in enumerate(graph.sparse_initializer) if entry.values.name in self.unused]
        _remove(graph.sparse_initializer, sparse)
        annotated = [n for n, entry in enumerate(graph.quantization_annotation) if entry.tensor_name in self.unused]
        _remove(graph.quantization_annotation, annotated)
        graph.initializer.extend(self.emitter.initialisers)
        if self.model.ir_version < INITIALISERS_ARE_INPUTS:
            for tensor in self.emitter.initialisers:
                graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))

    def _rebuild(self, graph: onnx.GraphProto) -> None:
        kept: list[onnx.NodeProto] = []
        for number, node in enumerate(self.nodes):
            if number in self.in_place:
                kept += self.in_place[number]
            elif number not in self.gone:
                kept.append(node)
        del graph.node[:]
        graph.node.extend(kept)

    def _conv(self, replacement: Replacement) -> onnx.NodeProto:
        found = f"no node {replacement.node}"
        if 0 <= replacement.node < len(self.nodes):
            node = self.nodes[replacement.node]
            found = f"{node.op_type} of domain {node.domain!r}"
            convolves = node.op_type in ("Conv", "ConvTranspose") and node.domain in STANDARD_DOMAINS
            if convolves and replacement.node not in self.gone:
                return node
            found = f"{found}, replaced already" if convolves else found
        raise ExportError(
            f"{self.source}: node {replacement.node}: expected a Conv or ConvTranspose to replace, found {found}; "
            "name each convolution of this file once"
        )

    def _batch_norm(self, replacement: Replacement, conv: onnx.NodeProto) -> onnx.NodeProto:
        number = replacement.batch_norm
        node = self.nodes[number] if number is not None and 0 <= number < len(self.nodes) else onnx.NodeProto()
        normalises = node.op_type == "BatchNormalization" and list(node.input[:1]) == list(conv.output)
        if normalises and alone_uses(node, self.uses):
            return node
        raise ExportError(
            f"{self.source}: {conv.name or conv.output[0]}: expected node {number} to be a BatchNormalization, at work as in "
            f"inference, which alone uses {conv.output[0]}, found {node.op_type or 'no node'}; fold only such a one"
        )

    def _require_channels(self, conv: onnx.NodeProto, chains: list[list[ConvModule]]) -> None:
        """Only where the old weight is an initialiser. onnxruntime opens a graph whose channels do not fit, and fails as it
        runs."""
        shape = next((list(t.dims) for t in self.model.graph.initializer if t.name == conv.input[1]), [])
        groups = next((attribute.i for attribute in conv.attribute if attribute.name == "group"), 1)
        if len(shape) < 2:
            return
        ends = (shape[1] * groups, shape[0]) if conv.op_type == "Conv" else (shape[0], shape[1] * groups)
        for chain in chains:
            found = chain[0].in_channels, chain[-1].out_channels
            if found != ends:
                raise ExportError(
                    f"{self.source}: {conv.name or conv.output[0]}: expected what goes from {ends[0]} channels to {ends[1]}, "
                    f"found {found[0]} and {found[1]}; give each convolution its own replacement"
                )

    def _is_used(self, name: str) -> bool:
        return self.uses[name] > 0

    def _drop(self, number: int, inputs: list[str]) -> None:
        """Remove a node, and of the nodes and initialisers that made its constants, ``inputs``, those that nothing else uses."""
        self.gone.add(number)
        waiting = inputs
        self._release(inputs)
        while waiting:
            name = waiting.pop()
            if not name or name in self.unused or self.uses[name] > 0:
                continue
            maker = self.makers.get(name)
            if name in self.initialisers:
                self.unused.add(name)
            elif maker is not None and maker not in self.gone:
                node = self.nodes[maker]
                if any(map(self._is_used, node.output)):
                    continue
                used = [*node.input, *uses_inside(node).elements()]
                self.gone.add(maker)
                self.unused.update(filter(None, node.output))
                self._release(used)
                waiting += used

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            self.uses[name] -= 1

    def _type_of_weights(self, conv: onnx.NodeProto) -> int:
        if conv.input[1] not in self.initialisers and not self.inferred:
            self.inferred = inferred_types(self.model)
        found = self.initialisers.get(conv.input[1]) or self.inferred.get(conv.input[1])
        if found not in DTYPES:
            known = ", ".join(onnx.TensorProto.DataType.Name(kind) for kind in DTYPES)
            text = "none" if found is None else onnx.TensorProto.DataType.Name(found)
            raise ExportError(
                f"{self.source}: {conv.name or conv.output[0]}: expected weights of type {known}, found {text}; leave this "
                "convolution as it is, or convert the model to float32 first"
            )
        return found


def _remove(table: Any, numbers: list[int]) -> None:
    """Remove entries of a repeated field; the others are not copied, as weights are large."""
    for number in reversed(numbers):
        del table[number]


def _require_another_place(file: OnnxFile, path: Path) -> None:
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the folder does not exist; create it first")
    places = [] if file.path is None else [file.path]
    places += [file.folder / location for location in locations(file.model)]
    if any(_is_same(place_of_original, path) for place_of_original in places):
        raise UsageError(f"{path}: expected a place for the result, found the original model; name another place")


def _is_same(first: Path, second: Path) -> bool:
    try:
        return first.resolve() == second.resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a link to itself
        return False


def _lost_inputs(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """A note on weights that a caller could give as inputs, and that are gone."""
    if before.ir_version < INITIALISERS_ARE_INPUTS:
        return []  # all are inputs for the format's sake, and no caller gives them
    left = {entry.name for entry in after.graph.input}
    lost = [entry.name for entry in before.graph.input if entry.name not in left]
    if not lost:
        return []
    named = some_of(lost, NAMED)
    return [f"weights that were inputs with a value of their own have gone, and cannot be given any more: {named}"]


def _checked(draft: Path, file: OnnxFile) -> list[str]:
    """Raise ExportError unless the draft can be used as the original can; notes on what both fail."""
    notes: list[str] = []
    fault = _fault_of(draft)
    if fault is not None:
        if _fault_of(file.model if file.path is None else file.path) is None:
            raise ExportError(
                f"{draft.name}: expected a file that onnx's checker passes, as it does {file.source}, found: {fault}; "
                "leave the convolution that this names as it is"
            )
        notes.append(f"onnx's checker passes neither the original nor the result: {fault}")
    try:
        OnnxModel(draft, trust=True)
    except VerificationError as error:
        raise ExportError(
            f"{draft.name}: expected a file that onnxruntime opens, found: {error}; convert the original to newer operators "
            "and to float32, or leave the convolution that this names as it is"
        ) from error
    return notes


def _fault_of(model: onnx.ModelProto | Path) -> str | None:
    """What onnx's checker finds at first, in one line."""
    try:
        onnx.checker.check_model(str(model) if isinstance(model, Path) else model)
    except Exception as error:  # protobuf and onnx raise errors of many kinds
        text = one_line(error)
        return text if len(text) <= FAULT_LENGTH else text[: FAULT_LENGTH - 3] + "..."
    return None
