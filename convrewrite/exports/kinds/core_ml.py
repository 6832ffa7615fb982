"""Core ML, for Apple's devices: an ``.mlpackage`` that Xcode takes, an ML program in float32.

Its documentation: https://apple.github.io/coremltools/docs-guides/source/convert-pytorch-workflow.html
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from convrewrite.exports.export import Made, Opened, Source
from convrewrite.inputs import Inputs


class CoreML:
    """A program for inputs of the example's shapes. It is written on any system, and runs only on macOS."""

    name: ClassVar[str] = "coreml"
    package: ClassVar[str] = "coremltools"
    takes: ClassVar[Literal["onnx", "module"]] = "module"
    files: ClassVar[tuple[str, ...]] = ("model.mlpackage",)
    tolerance: ClassVar[float | None] = None

    def version(self) -> str:
        """That of coremltools."""
        import coremltools  # noqa: F401 - whether it can be

        return version("coremltools")

    def runs_here(self) -> str | None:
        """On macOS."""
        return None if sys.platform == "darwin" else "Core ML models run on macOS alone"

    def write(self, source: Source, path: Path) -> Made:
        """In float32: in half precision, coremltools' default, it would be held to torch more loosely."""
        import coremltools

        from convrewrite.exports.programs import fixed_program

        program = fixed_program(source).run_decompositions({})
        model = coremltools.convert(
            program, convert_to="mlprogram", compute_precision=coremltools.precision.FLOAT32, skip_model_load=True
        )
        model.save(str(path))
        return Made(len(source.inputs[0]))

    def open(self, path: Path) -> Opened:
        """Names of inputs and outputs are those in the file, in their order."""
        import coremltools

        model = coremltools.models.MLModel(str(path))
        description = model.get_spec().description
        names, outputs = ([entry.name for entry in part] for part in (description.input, description.output))

        def run(inputs: Inputs) -> Sequence[Any]:
            feed = {name: x.detach().cpu().contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
            found = model.predict(feed)
            return [found[name] for name in outputs]

        return run


EXPORT = CoreML
