"""OpenVINO's own format, in float32: a graph in XML and its weights beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from convrewrite.exports.export import Made, Opened, Source
from convrewrite.inputs import Inputs
from convrewrite.signal_stacks import signal_stack_kept


class OpenVino:
    """Made of the ONNX file, whose names and free axes it keeps."""

    name: ClassVar[str] = "openvino"
    package: ClassVar[str] = "openvino"
    takes: ClassVar[Literal["onnx", "module"]] = "onnx"
    files: ClassVar[tuple[str, ...]] = ("model.openvino.xml", "model.openvino.bin")
    tolerance: ClassVar[float | None] = None

    def version(self) -> str:
        """That of OpenVINO."""
        import openvino as ov

        return str(ov.__version__).split("-")[0]

    def runs_here(self) -> None:
        """It does."""

    def write(self, source: Source, path: Path) -> Made:
        """Weights stay float32; by default OpenVINO would halve them."""
        import openvino as ov

        # Not ov.convert_model, which may report to its makers that it was called.
        ov.save_model(ov.Core().read_model(_without_functions(source.file)), path, compress_to_fp16=False)
        return Made(source.batch, source.beyond)

    def open(self, path: Path) -> Opened:
        """Compiled for the processor; in float32, as processors with bfloat16 units would otherwise round."""
        import openvino as ov

        core = ov.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
        with signal_stack_kept():
            compiled = core.compile_model(core.read_model(path), "CPU", settings)
        outputs = range(len(compiled.outputs))

        def run(inputs: Inputs) -> Sequence[Any]:
            with signal_stack_kept():
                found = compiled([tensor.detach().cpu().contiguous().numpy() for tensor in inputs])
            return [found[index].copy() for index in outputs]

        return run


def _without_functions(file: Path) -> Path | bytes:
    """The file; its content, with their nodes in place of its functions, where it has any, as OpenVINO knows none."""
    from onnx.inliner import inline_local_functions

    from convrewrite.onnx_files import read_model

    if not read_model(file).functions:
        return file
    inlined: bytes = inline_local_functions(read_model(file, weights=True)).SerializeToString()
    return inlined


EXPORT = OpenVino
