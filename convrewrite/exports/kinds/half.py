"""The ONNX file in half precision: weights and values in float16, inputs and outputs in float32."""

from pathlib import Path
from typing import ClassVar, Literal

from convrewrite.exports.export import Made, Opened, Source
from convrewrite.inputs import Inputs
from convrewrite.values import some_of

LARGEST_FILE = 1_900_000_000
"""Most bytes of a file that is halved: onnx checks and infers a graph in one message, which holds 2 GB at most."""

WITHOUT_TRAINING = "the graphs of training in the ONNX file are left out, as they work on weights in float32"

NAMED = 5
"""Most nodes that a note names."""


class Half:
    """Made by onnxruntime's converter."""

    name: ClassVar[str] = "half"
    package: ClassVar[str] = "onnxruntime"
    takes: ClassVar[Literal["onnx", "module"]] = "onnx"
    files: ClassVar[tuple[str, ...]] = ("model.half.onnx",)
    tolerance: ClassVar[float | None] = 2e-2  # that of float16 outputs: the runtime rounds every value, torch none

    def version(self) -> str:
        """That of onnxruntime."""
        import onnxruntime
        import onnxruntime.transformers.float16

        return str(onnxruntime.__version__)

    def runs_here(self) -> None:
        """It does; on the processor onnxruntime computes in float32 between the roundings."""

    def write(self, source: Source, path: Path) -> Made:
        """What would overflow stays float32, and is named."""
        import onnx

        from convrewrite.errors import ExportError
        from convrewrite.exports.halving import halved
        from convrewrite.onnx_files import OnnxModel, mark_form, read_model, size_of

        if size_of(source.file) > LARGEST_FILE:
            raise ExportError(f"expected an ONNX file of less than {LARGEST_FILE:,} bytes")
        runtime = OnnxModel(source.file, trust=True)
        batches: tuple[Inputs, ...] = source.samples or (source.inputs,)
        feeds = [
            {n: x.detach().cpu().contiguous().numpy() for n, x in zip(runtime.input_names, b, strict=True)}
            for b in batches
        ]
        model = read_model(source.file, weights=True)
        training = bool(model.training_info)
        found = halved(model, feeds)
        mark_form(found.model, "half")
        onnx.checker.check_model(found.model, full_check=True)
        onnx.save(found.model, str(path))
        notes = (*_notes(found.kept, found.nodes), *([WITHOUT_TRAINING] if training else []))
        return Made(source.batch, source.beyond, notes)

    def open(self, path: Path) -> Opened:
        """In onnxruntime."""
        from convrewrite.onnx_files import OnnxModel

        runtime = OnnxModel(path, trust=True)
        return lambda inputs: list(runtime(*inputs).values())


def _notes(kept: tuple[str, ...], nodes: int) -> tuple[str, ...]:
    if not kept:
        return ()
    return (
        f"{len(kept)} of {nodes} nodes stay float32, as their numbers come near the largest of float16: {some_of(kept, NAMED)}",
    )


EXPORT = Half
