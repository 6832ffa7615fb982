"""What a run is asked, as one value: :class:`Settings`. The Python interface, the fx pass, the command line and the stages share
it.

An option is added here and nowhere else: as a field of :class:`Settings`, told of in its docstring, and as a key of the keyword
arguments below it. What its field says as a :class:`Flag` is its option on the command line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, TypedDict

from convrewrite import values
from convrewrite.errors import PlanError, UsageError
from convrewrite.flags import flag
from convrewrite.machine import PROBE_SECONDS

if TYPE_CHECKING:
    from convrewrite.meanings import Meaning, WantedOutputs
    from convrewrite.runtime import Timer

BUDGETS = ("macs", "params", "latency")
GIGABYTE = 1 << 30

MEMORY = 4 * GIGABYTE
"""Bytes of activations and moments held at once, unless the caller says otherwise."""


@dataclass(frozen=True, slots=True)
class Keep:
    """The fidelity that must be kept on held-out inputs: the share of examples with the same top class, or at most so much
    relative error of every output."""

    measure: Literal["agreement", "error"]
    limit: float

    def __str__(self) -> str:
        """As in a report."""
        if self.measure == "agreement":
            return f"top-1 agreement of at least {self.limit:g}"
        return f"relative output error of at most {self.limit:g}"


KeepSource = float | Mapping[str, float] | Keep | None


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan is made for: parts of the whole model's costs that may be left, the fidelity to keep, or neither: then
    every rule's own ratio holds. ``outputs``: what the caller said of their meanings."""

    budget: Mapping[str, float]
    keep: Keep | None = None
    outputs: "Mapping[str, Meaning]" = field(default_factory=dict)

    @property
    def by_ratio(self) -> bool:
        """Whether nothing was asked."""
        return not self.budget and self.keep is None

    @property
    def for_speed(self) -> bool:
        """Whether the result must not be slower: unless only MACs or parameters were asked for."""
        return not self.budget or "latency" in self.budget


def _this_machine() -> "Timer":
    from convrewrite.runtime import THIS_MACHINE

    return THIS_MACHINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run is asked, and how it is to work.

    Attributes:
        budget: parts of the whole model that may be left, ``{"macs": 0.5}``, ``"params"`` or ``"latency"`` (measured in
            onnxruntime), alone or together: at every site the option is chosen whose *measured* effect on the outputs
            adds up to the least. None: each rule's own ratio.
        keep: instead of a budget, the most saving of MACs whose measured agreement of the top class stays at this share,
            as 0.98, or whose relative output error stays below ``{"error": 0.02}``. With a budget: a limit on its result.
        outputs: what outputs mean, by name, where it is not as it is told from the model and its values: ``"logits"``,
            ``"probabilities"`` (that sum to one), ``"multilabel"`` (independent probabilities), ``"embedding"`` (only its
            direction counts), ``"values"`` or ``"ignore"``; or a pair of that and a weight among several outputs.
        fast: measure less while planning, and refine nothing.
        refine: train the stages of all rewritten sites together towards the original, without labels, for some minutes at most;
            the result is never further from it on held-out inputs. None: where real inputs are given, and there is something
            to gain, unless the model is so large that it would take longer than that.
        threads: at which latency is measured.
        seed: of everything random; with the same inputs, seed and thread count the result is byte-equal.
        memory: bytes that activations, covariances and gathered positions may take together; activations beyond it wait on
            disk. One batch at work, the model and Python itself come on top. A limit that the largest site exceeds alone
            is refused.
        output_weighting: weigh the errors of a site's output channels by what the model's outputs feel of them, which
            takes gradients of the original model. False: all count alike.
        timeout: seconds that an ONNX file may take to open, and again to run once, in a process of its own.
        measure: False leaves out export, parity and latency.
        exclude: sites to keep, whatever the rules say, by name or as shell patterns, ``layer4.*``.
        only: where any are named, the only sites that may be rewritten, likewise.
        resume: take the survey and the fits that earlier runs of the same model left in the user's cache folder, an interrupted
            one or one within another budget, and leave those of this run. The result is the same with them and without.
        timer: who measures seconds; onnxruntime and torch on this machine, unless told otherwise.

    Raises UsageError, or PlanError for a budget or a fidelity to keep, for values that no run can work with.
    """

    budget: Mapping[str, float] | None = field(
        default=None,
        metadata=flag(
            "--budget",
            kind=list[str] | None,
            read=values.budget,
            help="Part of the model that may be left, as macs=0.5, params=0.5, latency=0.6.",
        ),
    )
    keep: KeepSource = field(
        default=None,
        metadata=flag(
            "--keep",
            read=values.keep,
            help="The fidelity to keep on held-out inputs: 0.98 of the top classes, or error=0.02.",
        ),
    )
    outputs: "WantedOutputs | None" = field(
        default=None,
        metadata=flag(
            "--output",
            kind=list[str] | None,
            read=values.outputs,
            help="What an output means: NAME=logits, probabilities, multilabel, embedding, values or ignore; "
            ":WEIGHT may follow.",
        ),
    )
    fast: bool = field(
        default=False, metadata=flag("--fast", kind=bool, help="Measure less while planning, and refine nothing.")
    )
    refine: bool | None = field(
        default=None,
        metadata=flag(
            "--refine/--no-refine",
            kind=bool | None,
            help="Train what was rewritten towards the original, without labels; by default where that gains something.",
        ),
    )
    threads: int = field(
        default=1,
        metadata=flag("--threads", kind=int, check=values.threads, help="Threads at which latency is measured."),
    )
    seed: int = field(
        default=0, metadata=flag("--seed", kind=int, check=values.seed, help="Seed of everything random.")
    )
    memory: int = field(
        default=MEMORY,
        metadata=flag(
            "--memory",
            kind=float,
            check=values.memory,
            read=lambda gigabytes: int(gigabytes * GIGABYTE),
            default=MEMORY / GIGABYTE,
            help="GB for inputs, activations and moments; activations beyond it wait on disk.",
        ),
    )
    output_weighting: bool = True
    timeout: float = field(
        default=PROBE_SECONDS,
        metadata=flag(
            "--timeout",
            kind=float,
            check=values.seconds,
            help="Seconds an ONNX file may take to open, and to run once.",
        ),
    )
    measure: bool = field(
        default=True,
        metadata=flag(
            "--onnx/--no-onnx",
            kind=bool,
            help="Export to ONNX, check parity and time; without it outputs are compared.",
        ),
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "--exclude",
            kind=list[str] | None,
            read=tuple,
            help="Keep the sites of this name, or pattern as 'layer4.*'; repeat it.",
        ),
    )
    only: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "--only",
            kind=list[str] | None,
            read=tuple,
            help="Rewrite no other sites than those of this name, or pattern; repeat it.",
        ),
    )
    resume: bool = field(
        default=True,
        metadata=flag(
            "--resume/--no-resume",
            kind=bool,
            help="Take over what an interrupted run, or one within another budget, found out already; or not.",
        ),
    )
    timer: "Timer" = field(default_factory=_this_machine)

    def __post_init__(self) -> None:
        values.seed(self.seed)
        values.threads(self.threads)
        values.memory_bytes(self.memory)
        values.seconds(self.timeout)
        if "latency" in self.constraints.budget and not self.measure:
            raise PlanError(values.NEEDS_TIMES)

    @property
    def constraints(self) -> Constraints:
        """The part that says what a plan is made for, parsed."""
        from convrewrite.meanings import asked_meanings

        constraints = Constraints(dict(self.budget or {}), keep_of(self.keep), asked_meanings(self.outputs))
        check_budget(constraints.budget)
        return constraints


SHARED = {entry.name: entry.metadata for entry in fields(Settings)}
"""The flags of Settings, for options that a recovery has too."""

MINUTES = 10.0
"""Minutes of a recovery, unless it is told: on two cores, ten epochs of a small network's training images."""

RATE = 5e-3
"""Largest step of a recovery, as a part of each parameter's size, unless it is told: docs/recover.md says how it was chosen."""

FEATURES = 10.0
"""Weight of features in a recovery's first part, unless it is told: their errors outweigh the outputs' then."""

BATCH = 128
"""Examples in a step, unless it is told: half of them would leave cores idle, twice as many halve the steps."""

TEMPERATURE = 1.0
"""Temperature of class scores, unless it is told: what is judged is the KL at 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What a recovery by distillation is asked, and how it is to work.

    Attributes:
        minutes: wall time of the training; 10 where neither this nor ``epochs`` is given.
        epochs: instead, times that every input is seen: the result then hangs on inputs and seed alone, not on the clock.
        rate: the highest learning rate of AdamW, as a part of each parameter's root mean square; a warm-up comes before and a
            cosine after it.
        batch: examples in a step, of all processes together.
        temperature: of the class scores that are compared.
        features: weight of the relative squared error of features at the ends of blocks against that of the outputs, in the first
            three tenths of the training. 0: the outputs alone count, and the original need not run beside.
        everything: train all parameters, not only those of rewritten sites.
        seed: of the order of inputs, of augmentation, and of which inputs are held out.
        threads: at which latency is measured.
        memory: bytes of inputs, and of the original's outputs where they are kept.
        outputs: what outputs mean, as in :class:`Settings`; by default what the plan says.
        timeout: seconds that an original in an ONNX file may take to open, and again to run once.
        measure: False leaves out export, parity and latency.
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
        metadata=flag("--features", kind=float, help="Weight of features at the ends of blocks, at first; 0 for none."),
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
    timer: "Timer" = field(default_factory=_this_machine)

    def __post_init__(self) -> None:
        values.seed(self.seed)
        values.threads(self.threads)
        values.memory_bytes(self.memory)
        values.seconds(self.timeout)
        if self.minutes is not None and self.epochs is not None:
            raise UsageError("--minutes, --epochs: expected one of them, found both; leave one out")
        for name, value in (("--minutes", self.minutes), ("--epochs", self.epochs), ("--rate", self.rate)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name}: expected a finite number above 0, found {value:g}")
        if not 0 < self.temperature < math.inf or not 0 <= self.features < math.inf:
            raise UsageError(
                "--temperature, --features: expected finite numbers, the first above 0, the second not below it, found "
                f"{self.temperature:g} and {self.features:g}"
            )
        if self.batch < 1:
            raise UsageError(f"--batch: expected at least 1, found {self.batch}")

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
    timer: "Timer"


class WorkOptions(TypedDict, total=False):
    """The fields of :class:`Settings` that a plan holds nothing of, as keyword arguments."""

    outputs: "WantedOutputs | None"
    threads: int
    memory: int
    output_weighting: bool
    refine: bool | None
    timeout: float
    measure: bool
    exclude: tuple[str, ...]
    only: tuple[str, ...]
    resume: bool
    timer: "Timer"


class ChoiceOptions(WorkOptions, total=False):
    """Those that can be given by keyword only, where options are chosen."""

    keep: KeepSource
    fast: bool


class SettingsOptions(ChoiceOptions, total=False):
    """All fields of :class:`Settings` as keyword arguments."""

    budget: Mapping[str, float] | None
    seed: int


def keep_of(value: KeepSource) -> Keep | None:
    """``0.98`` or ``{"error": 0.02}`` as a Keep. Raises PlanError for another key or a value outside (0, 1)."""
    if value is None or isinstance(value, Keep):
        return value
    entries = dict(value) if isinstance(value, Mapping) else {"agreement": value}
    name, limit = next(iter(entries.items()), ("", 0.0))
    if len(entries) != 1 or name not in ("agreement", "error"):
        raise PlanError(f"keep: expected a number such as 0.98, or error=0.02, found {', '.join(entries) or 'nothing'}")
    if not 0 < limit < 1:
        raise PlanError(
            f"keep: expected {name} in (0, 1), as in {'0.98' if name == 'agreement' else 'error=0.02'}, found {limit:g}"
        )
    return Keep("agreement" if name == "agreement" else "error", float(limit))


def check_budget(budget: Mapping[str, float]) -> None:
    """Raise PlanError for an unknown budget or a value outside (0, 1)."""
    for name, value in budget.items():
        if name not in BUDGETS:
            raise PlanError(f"budget {name!r}: expected one of {', '.join(BUDGETS)}, as in macs=0.5")
        if not 0 < value < 1:
            raise PlanError(f"budget {name}={value:g}: expected a part of the original's in (0, 1), as in {name}=0.5")
