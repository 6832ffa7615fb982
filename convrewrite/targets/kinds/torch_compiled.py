"""torch.compile, with its own backend or another, as ``torch-compile:cudagraphs``; with a device as ``torch-compile:cuda``."""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from convrewrite.errors import UsageError
from convrewrite.machine import is_ours
from convrewrite.targets.kinds.torch_eager import TorchEager, inference_at, placed, require_device
from convrewrite.targets.target import Clock, Compiled, Program, name_of

INDUCTOR = "inductor"
"""The default backend."""


@dataclass(frozen=True, slots=True)
class TorchCompiled:
    """Modules compiled for inputs of one shape. On the processor the default backend needs a C++ compiler."""

    option: str = ""
    package: ClassVar[str] = "torch"
    takes: ClassVar[Literal["onnx", "module"]] = "module"

    @property
    def name(self) -> str:
        """``torch-compile``, or with backend or device after a colon."""
        return name_of("torch-compile", self.option)

    def version(self) -> str:
        """Raises UsageError for an option that is neither a backend nor a device that is there, and where another user has made
        the folder that the default backend compiles in."""
        import torch

        if self._device:
            require_device(self.name, self._device)
        elif self.option and self.option not in torch.compiler.list_backends(exclude_tags=()):
            found = ", ".join(torch.compiler.list_backends(exclude_tags=()))
            raise UsageError(f"--runtime {self.name}: expected a device or a backend of torch.compile ({found})")
        if self._backend == INDUCTOR:
            _require_own_folder(self.name)
        return str(torch.__version__)

    @property
    def _device(self) -> str:
        return self.option if self.option.partition(":")[0] in ("cpu", "cuda", "mps", "xpu") else ""

    @property
    def _backend(self) -> str:
        return INDUCTOR if self._device or not self.option else self.option

    def block(self) -> int:
        """As in eager torch, whose convolutions it calls."""
        return TorchEager().block()

    def lacks(self, _program: Program) -> tuple[str, ...]:
        """None: what it cannot compile it runs as it is."""
        return ()

    def compile(self, program: Program, inputs: Sequence[Any], _threads: int) -> Compiled:
        """Compiled at its first call."""
        import torch

        backend = self._backend
        torch.compiler.reset()  # what was compiled for another module of the same class must not stand in the way
        return placed(
            program.module, inputs, self._device, lambda module: torch.compile(module, backend=backend, dynamic=False)
        )

    def clock(self, threads: int) -> Clock:
        """As in eager torch."""
        return TorchEager(self._device).clock(threads)

    def at_work(self, threads: int) -> AbstractContextManager[object]:
        """As in eager torch, but compiled modules run compiled, whatever holds around it."""
        return _compiled_at(threads)


def _require_own_folder(name: str) -> None:
    """Raise UsageError where the folder in which torch keeps compiled code, and from which it runs that, is another user's: its
    place among the temporary files is one that everybody knows."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = default_cache_dir()
    if os.path.lexists(folder) and not is_ours(os.lstat(folder)):
        raise UsageError(
            f"--runtime {name}: expected {folder}, from which torch runs compiled code, to be this user's own, found it another "
            "user's; name another folder for temporary files in TMPDIR"
        )


@contextmanager
def _compiled_at(threads: int) -> Iterator[None]:
    from convrewrite.process import compiled

    importlib.import_module("torch._dynamo")  # ``compiled`` only sets it up if it is imported
    with inference_at(threads), compiled("default"):
        yield


TARGET = TorchCompiled
