"""Eager torch, on the processor or on another device, as ``torch:cuda``."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from convrewrite.errors import UsageError
from convrewrite.machine import channel_block
from convrewrite.targets.target import Clock, Compiled, Program, clock_on, name_of


@dataclass(frozen=True, slots=True)
class TorchEager:
    """Modules called as they are."""

    option: str = ""
    package: ClassVar[str] = "torch"
    takes: ClassVar[Literal["onnx", "module"]] = "module"

    @property
    def name(self) -> str:
        """``torch``, or with the device after a colon."""
        return name_of("torch", self.option)

    def version(self) -> str:
        """Raises UsageError for a device that is not there."""
        import torch

        if self.option:
            require_device(self.name, self.option)
        return str(torch.__version__)

    def block(self) -> int:
        """That of oneDNN's blocked layouts."""
        return channel_block()

    def lacks(self, _program: Program) -> tuple[str, ...]:
        """None: a module that came here runs in torch."""
        return ()

    def compile(self, program: Program, inputs: Sequence[Any], _threads: int) -> Compiled:
        """The module on the device; a call returns once the device is done."""
        return placed(program.module, inputs, self.option, lambda module: module)

    def clock(self, threads: int) -> Clock:
        """As for other runtimes, the calling thread's time at one thread on the processor."""
        return clock_on(self.option, threads)

    def at_work(self, threads: int) -> AbstractContextManager[object]:
        """So many threads, and nothing recorded for gradients."""
        return inference_at(threads)


def require_device(name: str, device: str) -> None:
    """Raise UsageError unless torch can put a tensor there."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch refuses devices in these ways
        raise UsageError(
            f"--runtime {name}: expected a device that the installed torch has, found {device!r}; cpu is always there"
        ) from error


@contextmanager
def inference_at(threads: int) -> Iterator[None]:
    """So many threads of torch, in inference mode."""
    import torch

    from convrewrite.process import torch_threads

    with torch_threads(threads), torch.inference_mode():
        yield


def _nothing() -> None:
    """The processor is done when a call returns."""


def waiting(device: str) -> Callable[[], object]:
    """What waits until this very device, not the one that torch takes by itself, is done with all that it was given."""
    import torch

    kind = device.partition(":")[0]
    if kind in ("cuda", "xpu"):
        return partial(getattr(torch, kind).synchronize, device)
    return torch.mps.synchronize if kind == "mps" else _nothing


def placed(module: Any, inputs: Sequence[Any], device: str, made: Callable[[Any], Callable[..., Any]]) -> Compiled:
    """A module called on inputs, both on this device, or where they are; ``made`` turns it into what is called. One that works on
    its inputs in place, as a call of it shows, gets copies."""
    import torch

    from convrewrite.leaves import as_real, leaves_of

    here = [x if isinstance(x, torch.Tensor) else torch.from_numpy(x) for x in inputs]
    if device:
        module, here = copy.deepcopy(module).to(device), [x.to(device) for x in here]
    call = made(module)
    wait, tried = waiting(device), [x.clone() for x in here]
    call(*tried)
    stay = all(torch.equal(before, after) for before, after in zip(here, tried, strict=True))

    def run() -> Sequence[Any]:
        output = call(*(here if stay else [x.clone() for x in here]))
        wait()
        return [as_real(leaf) for _, leaf in leaves_of(output, "output") if isinstance(leaf, torch.Tensor)]

    return run


TARGET = TorchEager
