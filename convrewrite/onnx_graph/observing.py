"""Every value of a graph, as onnxruntime computes it: what a translation is checked against, node by node."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from torch import Tensor

from convrewrite.errors import ModelLoadError
from convrewrite.escaping import one_line
from convrewrite.folders import temporary, write_errors
from convrewrite.machine import memory_bytes
from convrewrite.onnx_files import require_well_behaved, run_within
from convrewrite.onnx_graph.file import OnnxFile
from convrewrite.onnx_graph.views import NO_TENSORS, sparse_values
from convrewrite.targets import session_options
from convrewrite.values import PROBE_SECONDS

Values = Mapping[str, Any]
"""Values by their names: arrays, and lists of arrays for sequences."""

SHOWN = re.compile(r"\((float|double|float16|u?int(8|16|32|64)|bool|string)\)")
"""Types of values, single or in sequences, that onnxruntime hands over; it runs others, as bfloat16, and cannot show them."""

SHARE = 6
"""All values of one example may take the machine's memory divided by this: they are held for four examples."""


def session_of(model: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
    """A session of a model in memory, whose weights may lie in files of ``folder``. Nothing is fused in it."""
    options = session_options(1)
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy that gives these values, whatever it gave before."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    known = {entry.name: entry for entry in (*model.graph.output, *model.graph.value_info)}
    del changed.graph.output[:]
    changed.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return changed


class Observer:
    """Runs a graph and gives the values of its nodes."""

    def __init__(self, file: OnnxFile, names: Collection[str]) -> None:
        """``names`` are the values wanted, outputs of nodes of the main graph. Raises ModelLoadError when onnxruntime cannot open
        that."""
        self._file = file
        stored = dict(sparse_values(file.model.graph))  # onnxruntime stores these sparse too, and cannot show them
        self.names = [name for name in names if name not in stored]
        try:
            self._session = self._opened()
        except Exception:  # onnxruntime's own exceptions share no public base class
            odd = {name for node in file.model.graph.node if node.op_type in NO_TENSORS for name in node.output}
            self.names = [name for name in self.names if name not in odd]
            try:
                self._session = self._opened()
            except Exception as error:
                raise ModelLoadError(
                    f"{file.source}: expected a graph whose inner values onnxruntime can show, found that "
                    f"{one_line(error, 300)}; simplify the graph, or export it again"
                ) from error

    def _opened(self) -> ort.InferenceSession:
        """A session that gives the values of those names whose types onnxruntime can hand over; the other names are left out."""
        session = session_of(with_outputs(self._file.model, self.names), self._file.folder)
        shown = [entry.name for entry in session.get_outputs() if SHOWN.search(entry.type)]
        if shown == self.names:
            return session
        self.names = shown
        return session_of(with_outputs(self._file.model, shown), self._file.folder)

    def try_out(self, inputs: Sequence[Tensor], seconds: float) -> None:
        """Run it in a process of its own first, where all values together may take a part of the machine's memory. Raises
        ModelLoadError where they take more, or too long."""
        memory = memory_bytes() // SHARE
        model = with_outputs(self._file.model, self.names)
        with temporary() as scratch:
            path = scratch.path / "observed.onnx"
            with write_errors():
                path.write_bytes(model.SerializeToString())
            require_well_behaved(
                path, seconds, inputs, memory=memory, folder=self._file.folder,
                source=f"{self._file.source}, with all values of its nodes",
            )  # fmt: skip

    def run(self, feed: Values, seconds: float = PROBE_SECONDS) -> dict[str, Any] | None:
        """The values for these inputs; None where onnxruntime refuses the inputs. Raises ModelLoadError where it takes more than
        ``seconds``."""
        try:
            found = run_within(self._session, self.names, feed, seconds, self._file.source)
        except ModelLoadError:
            raise
        except Exception:
            return None
        # A value without axes may come as a number instead of an array.
        values = [np.asarray(value) if isinstance(value, np.generic) else value for value in found]
        return dict(zip(self.names, values, strict=True))
