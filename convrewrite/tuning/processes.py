"""The processes that train together, on one machine or several: a small interface to accelerate.

Every process sees a part of each batch and has all parameters; gradients are averaged over the processes, so that the step is
that of one process with the whole batch. Nothing wraps the model: its hooks and its names stay.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from convrewrite.errors import ProcessLostError, UsageError
from convrewrite.escaping import first_line, innermost_cause
from convrewrite.places import PROCESSOR, has_float64

HALF = ("no", "bf16")
"""Precisions of accelerate that are accepted: fp16 would need losses to be scaled, and fp8 special layers."""

PRECISION = "ACCELERATE_MIXED_PRECISION"
"""The environment variable in which ``accelerate launch`` passes the precision, ``no`` if none was asked for."""


class Processes(Protocol):
    """All processes that train together, as one of them sees them; ``index`` 0 is the main one, which alone writes and reports.
    ``precision_asked``: whether what :meth:`autocast` does was asked for."""

    index: int
    count: int
    device: torch.device
    precision_asked: bool

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, in every process. Raises ProcessLostError where one of them is gone."""

    def of_main(self, value: float) -> float:
        """The main process's number, in every process. Raises ProcessLostError."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes within the block run in the precision that was asked for."""


class OneProcess:
    """This process alone, on one device; no precision was asked for."""

    index, count, precision_asked = 0, 1, False

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """``device``: where it trains."""
        self.device = torch.device(device)

    def mean(self, values: Tensor) -> Tensor:
        """The values."""
        return values

    def of_main(self, value: float) -> float:
        """The value."""
        return value

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing is cast."""
        return nullcontext()


class Accelerated:
    """The processes that ``accelerate launch`` or torchrun started: these decide devices, precision and number of processes."""

    def __init__(self, accelerator: Any, device: torch.device | None = None) -> None:
        """``accelerator``: an ``accelerate.Accelerator``; ``device``: the one that is asked for; several processes have one each
        of its kind. Raises UsageError for a precision that is not accepted, and where the processes have another kind of
        device."""
        _require_precision(accelerator.mixed_precision)
        self._accelerator = accelerator
        self.precision_asked = accelerator.mixed_precision != "no" or PRECISION in os.environ
        self.index: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.device: torch.device = accelerator.device if device is None or self.count > 1 else device
        if device is not None and device.type != self.device.type:
            raise UsageError(
                f"--device {device.type}: expected what the processes were launched with, {self.device.type}, found another; "
                "launch them for that device"
            )

    def mean(self, values: Tensor) -> Tensor:
        """Raises ProcessLostError where another process is gone."""
        if self.count == 1:
            return values
        with _others_there():
            total: Tensor = self._accelerator.reduce(values, reduction="sum")
        return total / self.count

    def of_main(self, value: float) -> float:
        """Raises ProcessLostError where another process is gone."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast

        with _others_there():
            told = broadcast(torch.tensor([value], dtype=torch.float64).to(self.device, self._exact))
        return float(told)

    def autocast(self) -> AbstractContextManager[Any]:
        """As accelerate casts."""
        cast: AbstractContextManager[Any] = self._accelerator.autocast()
        return cast

    @property
    def _exact(self) -> torch.dtype:
        """The most exact dtype that the device has."""
        return torch.float64 if has_float64(self.device) else torch.float32


@contextmanager
def accelerated(device: torch.device | None = None) -> Iterator[Accelerated]:
    """The processes as accelerate finds them in the environment; one if several were not launched. Accelerate's process-wide
    state is reset at the end, unless the caller's program had set it up before. ``device``: the one that is asked for.

    Raises UsageError where accelerate is not installed, and where it cannot work with what the environment says.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
    except ImportError as error:
        raise UsageError(
            "recover: expected accelerate, which carries devices and processes, found it missing; "
            "pip install 'convrewrite[recover]'"
        ) from error
    ours, grouped = (
        not PartialState._shared_state,
        torch.distributed.is_available() and torch.distributed.is_initialized(),
    )
    try:
        _require_precision((os.environ.get(PRECISION) or HALF[0]).lower())  # accelerate wants other packages for some
        try:
            accelerator = Accelerator(cpu=_on_processor(device))
        except Exception as error:  # it raises whatever torch or another library raises
            raise UsageError(
                "accelerate: expected an environment of accelerate launch, of torchrun, or of neither, found that it fails: "
                f"{innermost_cause(error)}; start it with one of these, or unset LOCAL_RANK, RANK, WORLD_SIZE and ACCELERATE_*"
            ) from error
        yield Accelerated(accelerator, device)
    finally:
        if ours:
            if not grouped and torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def joins_others(device: torch.device | None = None) -> bool:
    """Whether accelerate makes this process one of those that were launched with it: on devices other than the processor only
    where the launcher numbers the processes of a machine. ``device``: the one that is asked for."""
    return _on_processor(device) or os.environ.get("LOCAL_RANK", "-1") != "-1"


def _require_precision(precision: str) -> None:
    """Raise UsageError for one that is not accepted."""
    if precision not in HALF:
        raise UsageError(
            f"accelerate: expected a mixed precision of {' or '.join(HALF)}, found {precision}; launch with "
            "--mixed_precision bf16"
        )


def _on_processor(asked: torch.device | None) -> bool:
    """Whether accelerate has to be told to stay on the processor: without a device that several processes can share, it would
    take each process that torchrun started for a single one."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return True
    if asked is not None and asked.type == PROCESSOR:
        return True
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is None or (device.type == "mps" and "LOCAL_RANK" in os.environ)


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            "recover: another process of the run has ended, so this one cannot go on "
            f"({first_line(error, 120)}); the last checkpoint stands: "
            "start the same command again and it goes on from there"
        ) from error
