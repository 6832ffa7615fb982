"""What the commands of the command line share: their options, loading, and calibration."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convrewrite import values
from convrewrite.errors import ModelLoadError, PlanError, UsageError, VerificationError
from convrewrite.settings import FLAG, FormOptions, Settings, WorkOptions, flag
from convrewrite.targets import DEFAULT, read_profile
from convrewrite.values import PROBE_SECONDS

if TYPE_CHECKING:
    from convrewrite.inputs import Inputs
    from convrewrite.loading import Loaded

MODEL_HELP = "A .pt/.pth file (a whole module, or a state dict with --factory), an .onnx file, or pkg.mod:callable."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Rules = Annotated[
    list[str] | None, typer.Option("--rule", help="A built-in rule or a rule file; repeat to let them compete.")
]
Out = Annotated[
    Path | None, typer.Option("-o", "--out", help="Folder for the results; without it MODEL-rewritten, by its name.")
]
JSON_HELP = "Print JSON, as `convrewrite schema` describes it, and nothing else."
AsJson = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
Trust = Annotated[bool, typer.Option("--trust", help="Execute the code in a model file that is not safe to load.")]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the code of a model comes from, and its inputs; ``mean``, ``std`` and ``resize`` are as in ``read_calibration``."""

    input: list[str] | None = field(
        default=None,
        metadata=flag(
            "--input",
            kind=list[str] | None,
            help="Shape of an input, as 1x3x224x224 or NAME=1x3x224x224; repeat for several. Or FILE.py:NAME, an example.",
        ),
    )
    factory: str | None = field(
        default=None,
        metadata=flag("--factory", help="FILE.py:NAME or pkg.mod:NAME that builds the model of a state dict."),
    )
    calib: str | None = field(
        default=None,
        metadata=flag(
            "--calib", help="Representative inputs: .npy, .npz, .pt, a folder of images, FILE.py:NAME; or 'weights'."
        ),
    )
    mean: list[float] | None = field(
        default=None,
        metadata=flag(
            "--mean",
            check=values.mean,
            read=partial(values.numbers, "--mean"),
            help="Mean per channel of normalised images, as 0.485,0.456,0.406.",
        ),
    )
    std: list[float] | None = field(
        default=None,
        metadata=flag(
            "--std", check=values.std, read=partial(values.numbers, "--std"), help="Standard deviation per channel."
        ),
    )
    resize: tuple[int, int] | None = field(
        default=None,
        metadata=flag(
            "--resize",
            check=values.resize,
            read=partial(values.size, "--resize"),
            help="Resize images of a folder to HxW before the model's size is cut from their centre.",
        ),
    )

    @property
    def data(self) -> str | None:
        """Where calibration inputs are read from; None where there are none, as with ``--calib weights``."""
        return None if self.calib == "weights" else self.calib


@dataclass(frozen=True, slots=True)
class Towards:
    """What a recovery takes beside its inputs and settings; ``new``: where the result goes, if it does not replace the one that
    was given."""

    model: str | None = field(
        default=None,
        metadata=flag("--model", help="The original; by default the file that OUT's report names."),
    )
    new: Path | None = field(
        default=None,
        metadata=flag("-o", "--out", kind=Path | None, help="Another folder for the recovered result; OUT stays."),
    )
    augment: str | None = field(
        default=None,
        metadata=flag("--augment", help="FILE.py:NAME or pkg.mod:NAME, a function that changes a batch."),
    )
    labels: Path | None = field(
        default=None,
        metadata=flag(
            "--labels", kind=Path | None, help="Labels of the inputs, if they are to count: .npy, .npz or .pt."
        ),
    )
    resume: bool = field(
        default=True,
        metadata=flag("--resume/--no-resume", kind=bool, help="Go on where an interrupted run of the same kind was."),
    )


SETTING = {setting.name: setting for setting in fields(Settings)}
"""Options that a comparison shares with a run are taken from there."""


@dataclass(frozen=True, slots=True)
class Comparing:
    """How two models are compared, and timed against each other: ``timeout`` is in seconds."""

    expect: str | None = field(
        default=None,
        metadata=flag(
            "--expect",
            help="'parity' (the same numbers) or 'fidelity'; by default parity of torch with ONNX, unless one is rewritten.",
        ),
    )
    outputs: Mapping[str, tuple[str, float]] | None = field(default=None, metadata=SETTING["outputs"].metadata)
    agreement: float | None = field(
        default=None,
        metadata=flag("--agreement", kind=float | None, check=values.agreement, help="Least top-1 agreement, as 0.98."),
    )
    error: float | None = field(
        default=None,
        metadata=flag("--error", kind=float | None, check=values.error, help="Largest relative output error, as 0.05."),
    )
    threads: int = field(default=1, metadata=SETTING["threads"].metadata)
    rounds: int = field(
        default=25, metadata=flag("--rounds", kind=int, check=values.rounds, help="Interleaved rounds.")
    )
    seed: int = field(default=0, metadata=SETTING["seed"].metadata)
    timeout: float = field(default=PROBE_SECONDS, metadata=SETTING["timeout"].metadata)
    runtime: str = field(default=DEFAULT, metadata=SETTING["runtime"].metadata)


WRITTEN = ("export", "half", "opset", "free_axes")
"""Settings that say how a result is written."""


def _without(*names: str) -> tuple[str, ...]:
    """The settings that are options, but for some."""
    return tuple(name for name, setting in SETTING.items() if FLAG in setting.metadata and name not in names)


PLANNED = _without("refine", "int8", *WRITTEN)
"""Settings of a plan, which refines nothing, improves nothing for int8 and leaves no model."""

SWEPT = _without("budget", "keep", "int8", *WRITTEN)
"""Settings of a sweep: its points set what each is made for, and are not improved for int8."""

APPLIED = _without(*(SETTING.keys() - WorkOptions.__annotations__.keys() - FormOptions.__annotations__.keys()))
"""Settings of an application of a plan: those that a plan does not record."""


@dataclass(frozen=True, slots=True)
class Sweeping:
    """Which points a sweep has; ``metric`` names a function of a model."""

    budgets: list[float] = field(
        default_factory=lambda: values.budgets("0.8..0.1"),
        metadata=flag(
            "--budgets",
            kind=str,
            default="0.8..0.1",
            read=values.budgets,
            help="Parts that may be left: 0.8..0.1 in steps of a tenth, 0.8..0.1:10 for ten of them, or 0.5,0.3.",
        ),
    )
    resource: str = field(
        default="macs", metadata=flag("--resource", kind=str, help="What they are parts of: macs, params or latency.")
    )
    metric: str | None = field(
        default=None,
        metadata=flag("--metric", help="FILE.py:NAME or pkg.mod:NAME of a function from a model to a number."),
    )
    cluster: str | None = field(
        default=None,
        metadata=flag(
            "--cluster", help="Dask's workers: local[:N], here, or a scheduler's address, as tcp://host:8786."
        ),
    )


def load(source: str, factory: str | None, trust: bool) -> "Loaded":
    """The model that was named on the command line."""
    from convrewrite.loading import load_model

    return load_model(source, factory=factory, trust=trust)


def runners_of(pair: tuple[str, str], factory: str | None, trust: bool, timeout: float) -> tuple[Any, Any]:
    """Two models to compare, each a module, or an ONNX file as a callable; the factory is for those that it can build. Raises
    UsageError where it can build neither."""
    lacking = [factory if _may_need_factory(source) else None for source in pair]
    if factory is not None and not any(lacking):
        raise UsageError(
            f"--factory: expected a PyTorch model that it builds, found none in {' and '.join(pair)}; leave it out"
        )
    first, second = (runner_of(source, own, trust, timeout) for source, own in zip(pair, lacking, strict=True))
    return first, second


def _may_need_factory(source: str) -> bool:
    """Whether this is no ONNX graph, and no program, which builds its model itself."""
    from convrewrite.loading import is_program

    return not (Path(source).suffix.lower() == ".onnx" or _came_as_onnx(Path(source)) or is_program(source))


def _came_as_onnx(folder: Path) -> bool:
    """Whether this is a result whose model came as ONNX."""
    from convrewrite import results

    return (folder / results.ONNX).is_file() and not (folder / "model.pt").is_file()


def runner_of(source: str, factory: str | None, trust: bool, timeout: float) -> Any:
    """A module, or an ONNX file as a callable. A result folder gives its model."""
    from convrewrite import results
    from convrewrite.onnx_files import OnnxModel

    path = Path(source)
    if path.suffix.lower() == ".onnx":
        if not path.is_file():
            raise ModelLoadError(f"{source}: no such file; expected an ONNX file, a PyTorch model or a result folder")
        try:
            return OnnxModel(path, probe=timeout, trust=trust)
        except VerificationError as error:  # exit code 1 would say that two models differ
            raise ModelLoadError(f"{error}; export it again") from error
    if _came_as_onnx(path):
        return runner_of(str(path / results.ONNX), factory, trust, timeout)
    if (path / results.PLAN).is_file() and factory is not None:
        return results.load(path, load(factory, None, trust).model)
    return load(str(path / "model.pt") if path.is_dir() else source, factory, trust).model


def calibration_of(sources: Sources, model: Any, inputs: "Inputs", seed: int, memory: int) -> object:
    """The calibration that was named on the command line, of at most ``memory`` bytes; None and "weights" are left to the
    pipeline."""
    from convrewrite.calibration import read_calibration
    from convrewrite.inputs import parameter_names
    from convrewrite.loading import import_object

    if sources.data is None:
        require_calibration(sources)
        return sources.calib
    return read_calibration(
        sources.data, inputs, seed=seed, mean=sources.mean, std=sources.std, resize=sources.resize,
        import_object=import_object, names=parameter_names(model)[: len(inputs)], memory=memory,
    )  # fmt: skip


def notes_on(calibration: object) -> tuple[str, ...]:
    """What there is to say of how calibration inputs were read, where a report does not say it."""
    found: tuple[str, ...] = getattr(calibration, "notes", ())
    return found


def require_agreeing(sources: Sources, settings: Settings | None = None, model: str | None = None) -> None:
    """Raise UsageError, or PlanError, for options that contradict each other whatever is in the file of the ``model``, and for a
    file of times that cannot be read: before a model is loaded."""
    require_calibration(sources)
    if settings is None:
        return
    if settings.keep is not None and sources.calib == "weights":
        raise PlanError(values.NEEDS_INPUTS)
    if settings.timings is not None:
        read_profile(Path(settings.timings))
    if settings.exports and not settings.measure and model is not None and Path(model).suffix.lower() != ".onnx":
        from convrewrite.exports import named_exports, require_no_file

        require_no_file(named_exports(settings.exports))


def require_calibration(sources: Sources) -> None:
    """Raise UsageError for options about calibration inputs where none are given."""
    if sources.data is not None:
        return
    for option, given in (("--mean", sources.mean), ("--std", sources.std), ("--resize", sources.resize)):
        if given is not None:
            raise UsageError(f"{option}: expected calibration inputs that it applies to, found none; add --calib")
