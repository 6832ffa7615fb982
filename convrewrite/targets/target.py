"""What can run a model, as a protocol, and the values that it takes and gives.

A target says its name and version, how many channels it works on at a time, and which operators of a model it lacks; it makes
a program ready to run, and names the clock by which its runs are timed. It imports the package of its runtime only when it is
used, so that a list of targets costs nothing, and torch only where the runtime is torch's own: a device that only measures times
has none.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

Clock = Callable[[], float]
Compiled = Callable[[], Sequence[Any]]
"""A program ready to run on its inputs; gives its outputs, arrays or tensors, in their order."""


@dataclass(frozen=True, slots=True)
class Program:
    """A model as targets take it: an ONNX file or its bytes, or a module of torch in eval mode. One of them may be missing."""

    onnx: Path | bytes | None = None
    module: Any = None


class Target(Protocol):
    """A runtime on some device. ``takes`` says which of a program's two forms it runs, ``package`` what pip installs it by."""

    package: ClassVar[str]
    takes: ClassVar[Literal["onnx", "module"]]

    @property
    def name(self) -> str:
        """As it is asked for: the runtime, and after a colon its option where it has one."""

    def version(self) -> str:
        """The version of the runtime that is installed. Raises ImportError where none is, UsageError for an option that it
        lacks."""

    def block(self) -> int:
        """Channels that it works on at a time: ranks and groups that are no multiple of it waste a part."""

    def lacks(self, program: Program) -> tuple[str, ...]:
        """Operators of an ONNX program that it does not have; empty where none is known."""

    def compile(self, program: Program, inputs: Sequence[Any], threads: int) -> Compiled:
        """The program ready to run on these inputs, arrays or tensors. Raises whatever the runtime does where it cannot."""

    def clock(self, threads: int) -> Clock:
        """Seconds by which its runs are timed."""

    def at_work(self, threads: int) -> AbstractContextManager[object]:
        """What has to be in effect while programs are compiled, run and timed."""


@dataclass(frozen=True, slots=True)
class OnnxTarget:
    """What runtimes of ONNX files on this machine have in common. ``option`` is what follows the colon."""

    option: str = ""
    takes: ClassVar[Literal["onnx", "module"]] = "onnx"

    def clock(self, threads: int) -> Clock:
        """The time of the calling thread at one thread, where nothing else does any work."""
        return clock_on(self.option, threads)

    def at_work(self, _threads: int) -> AbstractContextManager[object]:
        """Nothing: threads are an option of each session."""
        return nullcontext()


def clock_on(device: str, threads: int) -> Clock:
    """The time of the calling thread at one thread on the processor, which then does all the work, so that other processes do not
    count."""
    on_processor = device.lower() in ("", "cpu")  # also when it was asked for by name
    return time.thread_time if threads == 1 and on_processor else time.perf_counter


def array_of(value: Any) -> Any:
    """A numpy array of an array, or of a tensor on any device."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def source_of(program: Program) -> Path | bytes:
    """The ONNX form, which a target that takes it is always given."""
    assert program.onnx is not None, "the target takes ONNX"
    return program.onnx


def opened(source: Path | bytes) -> Any:
    """The ONNX model there, without weights that lie in other files."""
    import onnx

    if isinstance(source, bytes):
        return onnx.load_from_string(source)
    return onnx.load(source, format="protobuf", load_external_data=False)  # whatever the suffix


def name_of(kind: str, option: str) -> str:
    """``openvino``, or ``openvino:GPU``."""
    return f"{kind}:{option}" if option else kind
