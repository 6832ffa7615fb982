"""torch.export: a program of torch's own operators in a ``.pt2``, which runs where torch does, and is compiled ahead of time."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from convrewrite.exports.export import Made, Opened, Source
from convrewrite.inputs import Inputs


class TorchExport:
    """A program whose outputs are in the containers of the model."""

    name: ClassVar[str] = "torch_export"
    package: ClassVar[str] = "torch"
    takes: ClassVar[Literal["onnx", "module"]] = "module"
    files: ClassVar[tuple[str, ...]] = ("model.pt2",)
    tolerance: ClassVar[float | None] = None

    def version(self) -> str:
        """That of torch."""
        import torch

        return str(torch.__version__)

    def runs_here(self) -> None:
        """It does."""

    def write(self, source: Source, path: Path) -> Made:
        """As :func:`torch.export.save` does."""
        import torch

        from convrewrite.exports.programs import free_program

        program, made = free_program(source)
        content = io.BytesIO()  # torch ends the process where its own writer finds no room
        torch.export.save(program, content)
        with path.open("wb") as file:
            file.write(content.getbuffer())
        return made

    def open(self, path: Path) -> Opened:
        """The program as a module. The file is the one that this process wrote."""
        import torch

        from convrewrite.modules import named_outputs

        module = torch.export.load(path).module()

        def run(inputs: Inputs) -> Sequence[Any]:
            with torch.no_grad():
                return list(named_outputs(module(*inputs)).values())

        return run


EXPORT = TorchExport
