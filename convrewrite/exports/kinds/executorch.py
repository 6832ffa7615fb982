"""ExecuTorch, for phones and embedded devices: a ``.pte`` whose convolutions XNNPACK runs on the processor.

Its documentation: https://docs.pytorch.org/executorch/stable/using-executorch-export.html
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from convrewrite.exports.export import Made, Opened, Source
from convrewrite.inputs import Inputs


class ExecuTorch:
    """A program for inputs of the example's shapes; memory is planned for them ahead of time."""

    name: ClassVar[str] = "executorch"
    package: ClassVar[str] = "executorch"
    takes: ClassVar[Literal["onnx", "module"]] = "module"
    files: ClassVar[tuple[str, ...]] = ("model.pte",)
    tolerance: ClassVar[float | None] = None

    def version(self) -> str:
        """That of ExecuTorch; its writer and its runtime are imported, as they are built for one version of torch."""
        import executorch.backends.xnnpack.partition.xnnpack_partitioner
        import executorch.exir
        import executorch.runtime  # noqa: F401 - whether they can be

        return version("executorch")

    def runs_here(self) -> None:
        """It does."""

    def write(self, source: Source, path: Path) -> Made:
        """What XNNPACK does not support is left to ExecuTorch's own kernels."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        from convrewrite.exports.programs import fixed_program

        lowered = to_edge_transform_and_lower(fixed_program(source), partitioner=[XnnpackPartitioner()])
        with path.open("wb") as file:
            lowered.to_executorch().write_to_file(file)
        return Made(len(source.inputs[0]))

    def open(self, path: Path) -> Opened:
        """Its method ``forward``, in the runtime that comes with the package."""
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(str(path))
        method = program.load_method("forward")

        def run(inputs: Inputs) -> Sequence[Any]:
            assert program is not None  # the method runs in its memory
            # Its outputs lie in memory that the next call writes to.
            return [tensor.clone() for tensor in method.execute([tensor.contiguous() for tensor in inputs])]

        return run


EXPORT = ExecuTorch
