"""What an ONNX file from elsewhere may ask for: the operators that onnxruntime has, and data beside the file."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from convrewrite.absent import require_content
from convrewrite.contents import OPTIMISED, PICKLE, SAFETENSORS, ZIP, content_of
from convrewrite.errors import ModelLoadError

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")
"""Domains of the operators that are built into onnxruntime: no library has to be loaded for them."""

LARGEST = 2**31 - 1
"""Most bytes of one file, which protobuf limits."""

IN_MEMORY = "*/"
"""Beginning of locations that are no file: onnxruntime takes what follows for an address in the memory of the process."""

_OTHERS = {
    ZIP: "; a model of PyTorch is called .pt, and calibration inputs .npz",
    PICKLE: "; call it .pt",
    SAFETENSORS: "; call it .safetensors",
    OPTIMISED: "",
}
"""Formats that are told from ONNX, and what to do with a file of each."""


def require_self_contained(path: Path) -> None:
    """Raise ModelLoadError for operators of a library, and for weights in files that do not lie in the file's own folder.

    A file that is not ONNX passes, since opening it will fail, unless it is recognised as another format.
    """
    if not os.path.isfile(path):
        raise ModelLoadError(f"{path}: expected an ONNX file, found {'a folder' if os.path.isdir(path) else 'none'}")
    require_content(path, "an ONNX file")
    if path.stat().st_size > LARGEST:
        raise ModelLoadError(
            f"{path}: expected at most {LARGEST} bytes, as ONNX has it, found {path.stat().st_size}; export it with its "
            "weights in a second file"
        )
    try:
        model = read_model(path)
    except Exception:  # protobuf and onnx raise errors of many kinds
        _require_no_other(path)
        return
    own = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own:
            raise ModelLoadError(
                f"{path}: expected operators of onnxruntime itself, found {node.op_type} of {node.domain}, which is code from "
                "elsewhere; export the model without it, or pass --trust if you know where it comes from"
            )
    for tensor in tensors(model):
        _require_beside(path, tensor)


def without_shape(source: Path | bytes) -> set[str]:
    """The tensors among the inputs for which not even the number of axes is stated. onnxruntime has opened the file before."""
    model = onnx.load_from_string(source) if isinstance(source, bytes) else read_model(source)
    entries = [entry for entry in model.graph.input if entry.type.HasField("tensor_type")]
    return {entry.name for entry in entries if not entry.type.tensor_type.HasField("shape")}


def files_beside(path: Path) -> set[Path]:
    """The other files in which an ONNX file says that numbers of it lie: of its graph, of graphs inside of nodes, and of
    attributes."""
    outside = [tensor for tensor in tensors(read_model(path)) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    return {path.parent / entry.value for one in outside for entry in one.external_data if entry.key == "location"}


def read_model(path: str | Path, *, weights: bool = False) -> onnx.ModelProto:
    """The model as onnxruntime reads it, whatever the suffix: onnx takes files of some suffixes for text, and cannot read
    them. ``weights``: also those that lie in other files."""
    return onnx.load(str(path), format="protobuf", load_external_data=weights)


def _require_beside(path: Path, tensor: onnx.TensorProto) -> None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    folder = path.absolute().parent
    for name in (entry.value for entry in tensor.external_data if entry.key == "location"):
        if not _lies_in(folder, name):
            raise ModelLoadError(
                f"{path}: expected weights in the folder of the file, found {name} for {tensor.name}; "
                "put the file there, or pass --trust if you know where the model comes from"
            )
        if os.path.exists(folder / name) and not os.path.isfile(folder / name):  # to read a pipe would never end
            raise ModelLoadError(
                f"{path}: expected weights in a regular file, found another thing as {name!r} for {tensor.name}; "
                "put the file there"
            )


def _lies_in(folder: Path, name: str) -> bool:
    if name.startswith(IN_MEMORY):
        return False
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a link to itself: it lies nowhere
        return False


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph of a model, those of training, and those inside of nodes, of functions too, and of what functions have by
    default."""
    waiting = [model.graph, *(g for info in model.training_info for g in (info.initialization, info.algorithm))]
    for function in model.functions:
        waiting += _inner([*function.attribute_proto, *_attributes(function.node)])
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += _inner(_attributes(graph.node))


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.AttributeProto]:
    for node in nodes:
        yield from node.attribute


def _inner(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    """The graphs that attributes hold."""
    for attribute in attributes:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of the graphs, of those inside of nodes, and of functions."""
    nodes = [node for graph in _graphs(model) for node in graph.node]
    return nodes + [node for function in model.functions for node in function.node]


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds: weights of its graphs, and values of attributes, also those that are a function's
    defaults."""
    sparse: list[onnx.SparseTensorProto] = []
    for graph in _graphs(model):
        yield from graph.initializer
        sparse += graph.sparse_initializer
    defaults = [attribute for function in model.functions for attribute in function.attribute_proto]
    for attribute in (*defaults, *_attributes(_nodes(model))):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            sparse.append(attribute.sparse_tensor)
        sparse += attribute.sparse_tensors
    for one in sparse:
        yield from (one.values, one.indices)


def _require_no_other(path: Path) -> None:
    """Raise ModelLoadError for a file of another format under this name."""
    found = content_of(path)
    if found in _OTHERS:
        raise ModelLoadError(f"{path}: expected an ONNX file, found {found}{_OTHERS[found]}")
