"""The ONNX file of a result's folder, which may come from anyone, tried out before anything is made of it."""

from pathlib import Path

from convrewrite.inputs import Inputs, in_whole_batches
from convrewrite.onnx_files import OnnxModel
from convrewrite.runtime import Exporter


def require_tried(file: Path, exporter: Exporter, batch: Inputs, seconds: float) -> None:
    """Raise ModelLoadError unless the file asks for nothing from elsewhere, and opens and runs in a process of its own, within
    ``seconds`` each: what opens it later, or runs it, does so in this process and trusts it."""
    model = OnnxModel(file, probe=seconds)
    taken = batch if model.batch is None else in_whole_batches((batch,), model.batch)[0]
    model(*exporter.feed(taken))
