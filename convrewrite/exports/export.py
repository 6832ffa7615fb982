"""A form that a result can be exported to, as a protocol, and the values that it takes and gives.

A form says its name, the package that writes it, and the names of its files; it writes them, and opens what it wrote again, so
that the file itself is held to torch. It imports its package only when it is used, so that a list of forms costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import nn

from convrewrite.axes import beyond_batch
from convrewrite.inputs import Inputs

Opened = Callable[[Inputs], Sequence[Any]]
"""A file ready to run: from inputs to outputs, arrays or tensors, in the order of the model's."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: a model of torch in eval mode with an example of its inputs, and its ONNX file; one of the two may be
    missing. ``batch``: the examples that the file takes at a time, None for any number. ``free_axes`` are as in
    :func:`convrewrite.export`; ``samples`` are inputs such as the model will see, a few examples at a time."""

    inputs: Inputs
    module: nn.Module | None = None
    onnx: Path | None = None
    batch: int | None = None
    free_axes: tuple[str, ...] | None = None
    samples: tuple[Inputs, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The model, which a form that takes it is always given."""
        assert self.module is not None, "the form takes a model"
        return self.module

    @property
    def beyond(self) -> tuple[str, ...]:
        """Axes that are to be free besides the batch."""
        return beyond_batch(self.free_axes)

    @property
    def file(self) -> Path:
        """The ONNX file, which a form that takes it is always given."""
        assert self.onnx is not None, "the form takes an ONNX file"
        return self.onnx


@dataclass(frozen=True, slots=True)
class Made:
    """What was written: the examples that it takes at a time, None for any number; axes ``beyond`` the batch that it takes in any
    size, by their names; and notes on what falls short."""

    batch: int | None = None
    beyond: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Export(Protocol):
    """A form. ``package`` is what pip installs it by, ``takes`` which of a source's two models it is made of, ``files`` are the
    names of what it writes, first the one that is opened, ``tolerance`` is that of its numbers, None for that of the outputs' own
    type."""

    name: ClassVar[str]
    package: ClassVar[str]
    takes: ClassVar[Literal["onnx", "module"]]
    files: ClassVar[tuple[str, ...]]
    tolerance: ClassVar[float | None]

    def version(self) -> str:
        """The version of the package that is installed. Raises ImportError where none is."""

    def runs_here(self) -> str | None:
        """Why what it writes cannot be run on this machine; None where it can."""

    def write(self, source: Source, path: Path) -> Made:
        """Write the files, the first one as ``path``. Raises whatever the package does where it cannot."""

    def open(self, path: Path) -> Opened:
        """What was written there, ready to run."""
