"""What a recovery by distillation is asked; fields as in :mod:`convrewrite.settings.run`."""

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypedDict

from convrewrite import places
from convrewrite.errors import UsageError
from convrewrite.settings.flags import flag
from convrewrite.settings.kinds import require_kinds, require_limits
from convrewrite.settings.run import MEMORY, Settings, this_machine
from convrewrite.values import PROBE_SECONDS

if TYPE_CHECKING:
    from convrewrite.meanings import WantedOutputs
    from convrewrite.runtime import Timer

SHARED = {entry.name: entry.metadata for entry in fields(Settings)}
"""The flags of Settings, for options that a recovery has too."""

MINUTES = 10.0
"""Minutes of a recovery, unless others are given: on two cores, ten epochs of a small network's training images."""

RATE = 5e-3
"""Largest step of a recovery, as a part of each parameter's size, unless another is given: docs/recover.md says how it was
chosen."""

FEATURES = 10.0
"""Weight of features in a recovery, unless another is given."""

BATCH = 128
"""Examples in a step, unless others are given: half as many would leave cores idle, twice as many halve the number of steps."""

TEMPERATURE = 1.0
"""Temperature of class scores, unless another is given: the result is judged by the KL at 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What a recovery by distillation is asked, and how it is to work.

    Attributes:
        minutes: wall time of the training; 10 where neither this nor ``epochs`` is given.
        epochs: instead, how often every input is seen: the result then depends on inputs and seed alone, not on the clock.
        rate: the highest learning rate, as a part of each parameter's root mean square; a warm-up comes before it and a cosine
            decay after it.
        batch: examples in a step, of all processes together.
        temperature: of the class scores that are compared.
        features: weight of the relative squared error of features at the ends of blocks against that of the outputs. 0: the
            outputs alone count, and the original need not run alongside.
        everything: train all parameters, not only those of rewritten sites.
        seed: of the order of inputs, of augmentation, and of which inputs are held out.
        threads: at which latency is measured.
        memory: bytes of inputs, and of the original's outputs where they are kept.
        outputs: what outputs mean, as in :class:`Settings`; by default what the plan says.
        timeout: seconds that an original in an ONNX file may take to open, and again to run once.
        measure: False leaves out export, parity and latency.
        device: where it trains, as in :class:`Settings`; None: where accelerate chooses to. Several processes have a device of
            that kind each.
        timer: as in :class:`Settings`.

    Raises UsageError for values that no training can work with.
    """

    minutes: float | None = field(
        default=None,
        metadata=flag("--minutes", kind=float | None, help="Wall time of the training; 10 unless --epochs is given."),
    )
    epochs: float | None = field(
        default=None, metadata=flag("--epochs", kind=float | None, help="Times that every input is seen, instead.")
    )
    rate: float = field(
        default=RATE,
        metadata=flag("--rate", kind=float, help="Highest rate, relative to the size of each parameter."),
    )
    batch: int = field(default=BATCH, metadata=flag("--batch", kind=int, help="Inputs in a step, of all processes."))
    temperature: float = field(
        default=TEMPERATURE, metadata=flag("--temperature", kind=float, help="Temperature of class scores.")
    )
    features: float = field(
        default=FEATURES,
        metadata=flag("--features", kind=float, help="Weight of features at the ends of blocks; 0 for none."),
    )
    everything: bool = field(
        default=False, metadata=flag("--all", kind=bool, help="Train all parameters, not only rewritten sites.")
    )
    seed: int = field(default=0, metadata=SHARED["seed"])
    threads: int = field(default=1, metadata=SHARED["threads"])
    memory: int = field(default=MEMORY, metadata=SHARED["memory"])
    outputs: "WantedOutputs | None" = field(default=None, metadata=SHARED["outputs"])
    timeout: float = field(default=PROBE_SECONDS, metadata=SHARED["timeout"])
    measure: bool = field(default=True, metadata=SHARED["measure"])
    device: str | None = field(
        default=None,
        metadata=flag(
            "--device",
            check=places.there,
            help="Where to train: cpu, cuda, cuda:N, mps or auto; by default a device that is here.",
        ),
    )
    timer: "Timer | None" = None

    def __post_init__(self) -> None:
        require_kinds(self)
        require_limits(self)
        if self.minutes is not None and self.epochs is not None:
            raise UsageError("minutes, epochs: expected one of them, found both; leave one out")
        for name in ("minutes", "epochs", "rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name}: expected a finite number above 0, found {value:g}")
        if not 0 <= self.features < math.inf:
            raise UsageError(f"features: expected a finite number of at least 0, found {self.features:g}")
        if self.batch < 1:
            raise UsageError(f"batch: expected at least 1, found {self.batch}")

    @property
    def clock(self) -> "Timer":
        """Who measures seconds."""
        return this_machine() if self.timer is None else self.timer

    @property
    def time(self) -> float:
        """Minutes, where no epochs were asked for."""
        return MINUTES if self.minutes is None else self.minutes


class RecoveryOptions(TypedDict, total=False):
    """The fields of :class:`Recovery` as keyword arguments."""

    minutes: float | None
    epochs: float | None
    rate: float
    batch: int
    temperature: float
    features: float
    everything: bool
    seed: int
    threads: int
    memory: int
    outputs: "WantedOutputs | None"
    timeout: float
    measure: bool
    device: str | None
    timer: "Timer | None"
