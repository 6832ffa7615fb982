"""An ONNX file, or a model from memory, checked before anything else is done with it."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from convrewrite.errors import ModelLoadError, VerificationError
from convrewrite.folders import Scratch, temporary
from convrewrite.onnx_files import OnnxModel, read_model, tensors
from convrewrite.onnx_graph.external import locations
from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.ordering import put_in_order
from convrewrite.onnx_graph.source_files import SourceFiles, stamp_of
from convrewrite.onnx_graph.walks import graphs_of, with_inner
from convrewrite.values import PROBE_SECONDS


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A file and its session; ``seconds`` is what opening it may take, and running it once; ``scratch`` where a model from memory
    was written; ``reordered``: whether its nodes stood in another order in the file."""

    file: OnnxFile
    session: OnnxModel
    source_files: SourceFiles
    seconds: float = PROBE_SECONDS
    scratch: Scratch | None = field(default=None, repr=False)
    reordered: bool = False

    @property
    def path(self) -> Path:
        """Where the file lies."""
        assert self.file.path is not None, "a model from memory is written to a file"
        return self.file.path


def open_onnx(source: str | Path | onnx.ModelProto, *, trust: bool = False, seconds: float = PROBE_SECONDS) -> Opened:
    """Open a file in onnxruntime, first in a process of its own, with ``seconds`` for that and again for its first run.

    Unless it is trusted, operators of a library and weights outside of its folder are refused. Raises ModelLoadError.
    """
    if isinstance(source, onnx.ModelProto):
        return _from_memory(source, trust, seconds)
    path = Path(source)
    if not os.path.isfile(path):
        raise ModelLoadError(
            f"{path}: {'no regular file' if os.path.exists(path) else 'no such file'}; expected an ONNX file"
        )
    stamp = stamp_of(path)
    try:
        session = OnnxModel(path, probe=seconds, trust=trust)
        model = read_model(path)
        _require_text(model)
        reordered = put_in_order(model.graph)
    except VerificationError as error:
        raise ModelLoadError(f"{error}; export it again") from error
    except Exception as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{path}: expected an ONNX file, found one that cannot be read ({error})") from error
    file = OnnxFile(model, path.absolute().parent, str(source), path.absolute())
    beside = [file.folder / name for name in locations(model)]
    source_files = SourceFiles(path.absolute(), stamp, beside)
    return Opened(file, session, source_files, seconds, reordered=reordered)


def _require_text(model: onnx.ModelProto) -> None:
    """Raise UnicodeError for names that are no UTF-8: protobuf gives them as bytes, and onnxruntime does not mind."""
    graphs = list(graphs_of(model))
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for function in model.functions for node in with_inner(function.node)]
    held = [entry for graph in graphs for entry in (*graph.initializer, *graph.input, *graph.output, *graph.value_info)]
    names: list[object] = [entry.name for entry in (*held, *model.functions)]
    for node in nodes:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute)]
    if wrong := next((name for name in names if isinstance(name, bytes)), None):
        raise UnicodeError(f"the name {wrong!r} is no UTF-8")


def _left_behind(model: onnx.ModelProto) -> set[str]:
    """The files that have those numbers of a model from memory that were not loaded with it."""
    external = onnx.TensorProto.EXTERNAL
    outside = [one for one in tensors(model) if one.data_location == external and not one.HasField("raw_data")]
    return {entry.value for one in outside for entry in one.external_data if entry.key == "location"}


def _from_memory(model: onnx.ModelProto, trust: bool, seconds: float) -> Opened:
    """A copy of the model in a folder for temporary files: opening a session and timing need a file."""
    if elsewhere := _left_behind(model):
        raise ModelLoadError(
            f"ModelProto {model.graph.name}: expected weights in the model itself, found some in files beside it "
            f"({', '.join(sorted(elsewhere)[:3])}); give the path of its file, or load it with these (onnx.load(path))"
        )
    scratch = temporary()
    path = scratch.path / "given.onnx"
    try:
        onnx.save(model, str(path))
    except Exception as error:  # protobuf's own errors; one holds 2 GB at most
        raise ModelLoadError(
            f"ModelProto: expected a model that can be saved, found that {error}; give its file"
        ) from error
    name = f"ModelProto {model.graph.name}".strip()
    try:
        opened = open_onnx(path, trust=trust, seconds=seconds)
    except ModelLoadError as error:  # nobody knows the file, and it is gone by then
        raise ModelLoadError(str(error).replace(str(path), name)) from error
    opened.session.where = name
    return replace(opened, file=OnnxFile(opened.file.model, scratch.path, name, path), scratch=scratch)
