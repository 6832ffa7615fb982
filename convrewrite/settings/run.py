"""What a run is asked. An option is added here: a field of :class:`Settings`, described in its docstring, with its :class:`Flag`
for the command line, and as a key of the keywords below; a type of its own also in ``kinds``, another name in ``spellings``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from convrewrite import places, values
from convrewrite.errors import PlanError, UsageError
from convrewrite.settings.constraints import BUDGETS, Constraints, KeepSource, check_budget, keep_of
from convrewrite.settings.flags import flag
from convrewrite.settings.kinds import require_kinds, require_limits
from convrewrite.targets import DEFAULT, Profile, Target, read_profile, target_of
from convrewrite.values import PROBE_SECONDS

if TYPE_CHECKING:
    from convrewrite.meanings import Meaning, WantedOutputs
    from convrewrite.runtime import Timer

GIGABYTE = 1 << 30
"""Bytes of a GB, as ``--memory`` counts them."""

MEMORY = 4 * GIGABYTE
"""Bytes of inputs, activations and moments held at once, unless the caller says otherwise."""


def this_machine() -> "Timer":
    """The timer that measures unless another one is handed in."""
    from convrewrite.runtime import THIS_MACHINE

    return THIS_MACHINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run is asked, and how it is to work.

    Attributes:
        budget: parts of the whole model that may be left, ``{"macs": 0.5}``, ``"params"`` or ``"latency"`` (measured in
            ``runtime``), alone or together: at every site an option is chosen such that their *measured* effects on the outputs
            add up to the least. None: each rule's own ratio.
        keep: instead of a budget, the most saving of MACs whose measured agreement of the top class stays at this share, such as
            0.98, or whose relative output error stays below ``{"error": 0.02}``. With a budget: a limit on its result.
        outputs: what outputs mean, by name, where that is not what the model and its values suggest: ``"logits"``,
            ``"probabilities"`` (that sum to one), ``"multilabel"`` (independent probabilities), ``"embedding"`` (only its
            direction counts), ``"values"`` or ``"ignore"``; or a pair of that and a weight among several outputs.
        fast: measure less while planning, and refine only if ``refine`` asks for it.
        refine: train the stages of all rewritten sites together towards the original, without labels, for some minutes at most;
            the result is never further from it on held-out inputs. None: where real inputs are given, and there is something
            to gain, unless the model is so large that it would take longer than that.
        threads: at which latency is measured.
        any_speed: take options, and hand over results, that measure slower than what they replace, as for targets that cannot be
            measured. By default no slower one is taken, under every budget and every rule.
        int8: within a budget, improve the plan by what it does to the outputs once it is int8, which harms some structures more
            than others; not with ``fast``, and only in :func:`convrewrite.optimize`, as a plan is improved once it is fitted. The
            result is float32 all the same; :func:`convrewrite.quantise` makes int8 from it.
        seed: of everything random; with the same inputs, seed and thread count the result is byte-equal.
        memory: bytes that activations, covariances and gathered positions may take together; activations beyond two fifths of it
            wait on disk. One batch at work, the model and Python itself come on top. A limit that the largest site exceeds
            alone is refused.
        output_weighting: weigh the errors of a site's output channels by how much they affect the model's outputs, which takes
            gradients of the original model. False: all count alike.
        timeout: seconds that an ONNX file may take to open, and again to run once, in a process of its own.
        measure: False leaves out export, parity and latency.
        exclude: sites to keep, whatever the rules say, by name or as shell patterns, ``layer4.*``.
        only: where any are named, the only sites that may be rewritten, by name or pattern too.
        resume: take the survey and the fits that earlier runs of the same model left in the user's cache folder (an interrupted
            run, or one within another budget), and leave those of this run there. The result is the same with them and without.
        runtime: where the result is to run, ``NAME`` or ``NAME:option``: what is timed, and where parity must hold besides
            onnxruntime (docs/runtimes.md).
        timings: a file of times that ``convrewrite profile`` wrote on another machine: options are chosen by it, and the
            result is not timed here.
        export: forms that the result is written in besides ONNX, by name: ``"openvino"``, ``"torch_export"``, ``"executorch"``,
            ``"coreml"``, each held to torch on held-out inputs (docs/exports.md).
        half: write the ONNX file in half precision as well, held to torch in the same way.
        opset: version of the ONNX file's operators; None: that of the exporter.
        free_axes: axes along which the ONNX file must take any size, of ``"batch"``, ``"height"`` and ``"width"``; () for none.
            None: any batch where the model allows it.
        device: where the model is run, fitted and refined: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or ``"auto"``, the
            first of cuda, mps and cpu that is here. None: where the model lies. The result goes back there in any case, and is
            exported, timed and verified on the processor (docs/devices.md).
        timer: who measures seconds; None: this machine.

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
        default=False,
        metadata=flag("--fast", kind=bool, help="Measure less while planning, and refine only with --refine."),
    )
    any_speed: bool = field(
        default=False,
        metadata=flag("--any-speed", kind=bool, help="Take options that measure slower than what they replace, too."),
    )
    int8: bool = field(
        default=False,
        metadata=flag(
            "--int8",
            kind=bool,
            help="Within a budget, choose options by how well they quantise; and make int8 of the result too.",
        ),
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
            help="GB for inputs, activations and moments; activations beyond two fifths of it wait on disk.",
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
            help="Export to ONNX, check parity and time; without it outputs are compared in torch alone.",
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
    runtime: str = field(
        default=DEFAULT,
        metadata=flag(
            "--runtime",
            kind=str,
            help="Where the result is to run: onnxruntime, openvino, torch, torch-compile, with :OPTION, as onnxruntime:cuda.",
        ),
    )
    timings: str | None = field(
        default=None,
        metadata=flag("--timings", help="Times from another machine, as `profile` writes them, to choose options by."),
    )
    export: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "--export",
            kind=list[str] | None,
            read=tuple,
            help="Write the result as openvino, torch_export, executorch or coreml, too, held to torch; repeat it.",
        ),
    )
    half: bool = field(
        default=False,
        metadata=flag("--half", kind=bool, help="Write the ONNX file in half precision, too, held to torch."),
    )
    opset: int | None = field(
        default=None,
        metadata=flag("--opset", kind=int | None, help="Version of the ONNX file's operators, 18 or newer."),
    )
    free_axes: tuple[str, ...] | None = field(
        default=None,
        metadata=flag(
            "--free-axes",
            read=values.axes_of_text,
            help="Axes along which the ONNX file takes any size: batch, as batch,height,width, or none.",
        ),
    )
    device: str | None = field(
        default=None,
        metadata=flag(
            "--device",
            check=places.there,
            help="Where to run the model and to fit: cpu, cuda, cuda:N, mps or auto; by default where the model lies.",
        ),
    )
    timer: "Timer | None" = None

    def __post_init__(self) -> None:
        require_kinds(self)
        require_limits(self)
        if self.budget is not None and not self.budget:
            raise PlanError(
                f'budget: expected one of {", ".join(BUDGETS)}, as {{"macs": 0.5}}, found none; give one, or None'
            )
        if self.runtime != DEFAULT:
            target_of(self.runtime)
        self._require_forms()
        if self.timings is not None and not self.measure:
            raise UsageError(
                "--timings: expected options to be chosen by times, found --no-onnx (in Python measure=False), with which no "
                "time counts; leave out one of the two"
            )
        if self.runtime != DEFAULT and not self.measure:
            raise UsageError(
                f"--runtime {values.shown(self.runtime)}: expected something to be timed and held to torch there, found "
                "--no-onnx (in Python measure=False); leave out one of the two"
            )
        if "latency" in self.constraints.budget and not self.measure:
            raise PlanError(values.NEEDS_TIMES)

    def _require_forms(self) -> None:
        """Raise UsageError for what no file can be written in: before any work, and without importing torch if nothing is asked
        for."""
        if self.free_axes is not None:
            values.free_axes(self.free_axes, "free_axes")
        if not self.measure and (self.opset is not None or self.free_axes is not None):
            raise UsageError(
                "--opset, --free-axes: expected an ONNX file to hold for, found --no-onnx (in Python measure=False)"
            )
        if self.opset is not None:
            from convrewrite.onnx_files import require_opset

            require_opset(self.opset)
        if self.exports:
            from convrewrite.exports import named_exports

            named_exports(self.exports)

    def require_files_run(self) -> None:
        """Raise UsageError for a runtime in which int8 files cannot be timed."""
        if self.target.takes != "onnx":
            raise UsageError(
                f"int8: expected a runtime of ONNX files, as int8 is one, found --runtime {self.runtime}, which runs modules; "
                "leave out one of the two"
            )

    @property
    def exports(self) -> tuple[str, ...]:
        """All forms to be written besides ONNX."""
        return (*self.export, *(["half"] if self.half else []))

    @property
    def rounds(self) -> int:
        """Interleaved rounds in which options are timed, for a plan as on another machine."""
        return 5 if self.fast else 7

    @property
    def target(self) -> Target:
        """Where the result is to run."""
        return target_of(self.runtime)

    @property
    def block(self) -> int:
        """Channels that are worked on at a time where the result is to run."""
        return self.target.block() if self.profile is None else self.profile.block

    @property
    def threads_timed(self) -> int:
        """The threads that latencies are of: those of the other machine, where times come from there."""
        return self.threads if self.profile is None else self.profile.threads

    @property
    def profile(self) -> Profile | None:
        """The times from another machine. Raises UsageError for a file of times that cannot be read."""
        if self.timings is None:
            return None
        known = getattr(self.timer, "profile", None)
        return known if isinstance(known, Profile) else read_profile(Path(self.timings))

    def with_times(self) -> "Settings":
        """The same, with the file of times read: a long run needs it again at its end, when it may be gone, or another."""
        return self if self.timings is None else replace(self, timer=self.clock)

    @property
    def clock(self) -> "Timer":
        """The timer that measures seconds there. Raises UsageError for a file of times that cannot be read."""
        profile = self.profile
        if profile is None or self.timings is None:
            return (this_machine() if self.timer is None else self.timer).on(self.target)
        from convrewrite.runtime import ProfiledTimer

        return ProfiledTimer(profile, self.timings)

    @property
    def constraints(self) -> Constraints:
        """The part that says what a plan is made for, parsed."""
        meanings: Mapping[str, Meaning] = {}
        if self.outputs:  # meanings need torch, which a device that only measures times does not have
            from convrewrite.meanings import asked_meanings

            meanings = asked_meanings(self.outputs)
        constraints = Constraints(dict(self.budget or {}), keep_of(self.keep), meanings, self.any_speed)
        check_budget(constraints.budget)
        return constraints


class WorkOptions(TypedDict, total=False):
    """The fields of :class:`Settings` that a plan does not record, as keyword arguments."""

    outputs: "WantedOutputs | None"
    threads: int
    memory: int
    output_weighting: bool
    refine: bool | None
    timeout: float
    measure: bool
    resume: bool
    runtime: str
    timings: str | None
    opset: int | None
    free_axes: tuple[str, ...] | None
    device: str | None
    timer: "Timer | None"


class FormOptions(TypedDict, total=False):
    """The fields that say in which forms a result is written, besides ONNX."""

    export: tuple[str, ...]
    half: bool


class ChoiceOptions(WorkOptions, total=False):
    """The fields that can be given by keyword only, where options are chosen."""

    fast: bool
    any_speed: bool
    exclude: tuple[str, ...]
    only: tuple[str, ...]
