"""What the commands of the command line share: their options, loading, calibration, and the progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from convrewrite import values
from convrewrite.errors import ModelLoadError, UsageError, VerificationError
from convrewrite.escaping import printable

if TYPE_CHECKING:
    from convrewrite.inputs import Inputs
    from convrewrite.loading import Loaded
    from convrewrite.progress import Progress

MODEL_HELP = "A .pt/.pth file (a whole module, or a state dict with --factory), or pkg.mod:callable."


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]


Rules = Annotated[
    list[str] | None, typer.Option("--rule", help="A built-in rule or a rule file; repeat to let them compete.")
]


Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of an input, as 1x3x224x224; repeat for several. Or FILE.py:NAME, an example."),
]


Factory = Annotated[
    str | None, typer.Option("--factory", help="FILE.py:NAME or pkg.mod:NAME that builds the model of a state dict.")
]


Calib = Annotated[
    str | None,
    typer.Option(
        "--calib", help="Representative inputs: .npy, .npz, .pt, a folder of images, FILE.py:NAME; or 'weights'."
    ),
]


Mean = Annotated[
    str | None,
    typer.Option("--mean", callback=values.mean, help="Mean per channel of normalised images, as 0.485,0.456,0.406."),
]


Std = Annotated[str | None, typer.Option("--std", callback=values.std, help="Standard deviation per channel.")]


Resize = Annotated[
    str | None,
    typer.Option("--resize", callback=values.resize, help="Resize images of a folder to HxW before they are cropped."),
]


Budget = Annotated[
    list[str] | None,
    typer.Option("--budget", help="Part of the model that may be left, as macs=0.5, params=0.5, latency=0.6."),
]


Threads = Annotated[
    int, typer.Option("--threads", callback=values.threads, help="Threads at which latency is measured.")
]


Seed = Annotated[int, typer.Option("--seed", callback=values.seed, help="Seed of everything random.")]


Trust = Annotated[bool, typer.Option("--trust", help="Execute the code in a model file that is not safe to load.")]


Memory = Annotated[
    float,
    typer.Option(
        "--memory",
        callback=values.memory,
        help="GB for inputs, activations and moments; activations beyond it wait on disk.",
    ),
]


Keep = Annotated[
    str | None,
    typer.Option("--keep", help="The fidelity to keep on held-out inputs: 0.98 of the top classes, or error=0.02."),
]


Output = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        help="What an output means: NAME=logits, probabilities, multilabel, embedding, values or ignore; :WEIGHT may follow.",
    ),
]


Onnx = Annotated[
    bool,
    typer.Option("--onnx/--no-onnx", help="Export to ONNX, check parity and time; without it outputs are compared."),
]


Fast = Annotated[bool, typer.Option("--fast", help="Measure less while planning.")]


Agreement = Annotated[
    float | None,
    typer.Option("--agreement", callback=values.agreement, help="Least top-1 agreement, as 0.98."),
]


Error = Annotated[
    float | None,
    typer.Option("--error", callback=values.error, help="Largest relative output error, as 0.05."),
]


Timeout = Annotated[
    float,
    typer.Option("--timeout", callback=values.seconds, help="Seconds an ONNX file may take to open, and to run once."),
]


Rounds = Annotated[int, typer.Option("--rounds", callback=values.rounds, help="Interleaved rounds.")]


class Commands(TyperGroup):
    """The commands, none of which takes the last of several values for an option that has one: which was meant?"""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was named; raises UsageError where one of its options is given twice."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not isinstance(command, TyperGroup):
            parser = command.make_parser(ctx)
            parser.allow_interspersed_args = True  # the group itself, whose context this is, does not
            _, _, order = parser.parse_args(list(rest))
            for parameter in order:
                if order.count(parameter) > 1 and parameter.param_type_name == "option" and not parameter.multiple:
                    raise UsageError(
                        f"{max(parameter.opts, key=len)}: expected once, found more than once; give one value"
                    )
        return name, command, rest


def load(source: str, factory: str | None, trust: bool) -> "Loaded":
    """The model that was named on the command line."""
    from convrewrite.loading import load_model

    return load_model(source, factory=factory, trust=trust)


def runner_of(source: str, factory: str | None, trust: bool, timeout: float) -> Any:
    """A module, or an ONNX file as a callable. A result folder gives its model."""
    from convrewrite import pipeline
    from convrewrite.runtime import OnnxModel

    path = Path(source)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise ModelLoadError(f"{source}: no such file; expected an ONNX file, a PyTorch model or a result folder")
        try:
            return OnnxModel(path, probe=timeout, trust=trust)
        except VerificationError as error:  # exit code 1 says that two models differ, and this is none
            raise ModelLoadError(f"{error}; export it again") from error
    if (path / pipeline.PLAN).is_file() and factory is not None:
        return pipeline.load(path, load(factory, None, trust).model)
    return load(str(path / "model.pt") if path.is_dir() else source, factory, trust).model


def calibration_of(
    calib: str | None, model: Any, inputs: "Inputs", seed: int, mean: str | None, std: str | None, resize: str | None,
    memory: float,
) -> object:  # fmt: skip
    """The calibration that was named on the command line; None and "weights" are left to the pipeline."""
    from convrewrite.calibration import read_calibration
    from convrewrite.inputs import parameter_names
    from convrewrite.loading import import_object

    if calib is None or calib == "weights":
        for option, given in (("--mean", mean), ("--std", std), ("--resize", resize)):
            if given is not None:
                raise UsageError(f"{option}: expected calibration inputs that it applies to, found none; add --calib")
        return calib
    centre, spread = values.numbers("--mean", mean), values.numbers("--std", std)
    cover = values.size("--resize", resize)
    return read_calibration(
        calib, inputs, seed=seed, mean=centre, std=spread, resize=cover, import_object=import_object,
        names=parameter_names(model)[: len(inputs)], memory=int(memory * 2**30),
    )  # fmt: skip


def say(text: str) -> None:
    """Print lines, in which names from elsewhere can do nothing to the terminal."""
    typer.echo(printable(text, keep="\n\t"))


@contextmanager
def progress_bars() -> "Iterator[Progress]":
    """A bar per stage on the error stream, so that the report can be piped."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.fields[stage]:<18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int, text: str) -> None:
        if not tasks:
            bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(printable(text), total=total, stage=stage)
        bars.update(tasks[stage], completed=done, total=total, description=printable(text))

    try:
        yield show
    finally:
        if tasks:  # bars that were never started would leave an empty line above the error
            bars.stop()
