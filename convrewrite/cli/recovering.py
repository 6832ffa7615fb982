"""The command ``recover``: from words to a call of the pipeline, in each of the processes that were launched together."""

from dataclasses import dataclass, replace
from pathlib import Path

from convrewrite import pipeline
from convrewrite.calibration import Reading, read_labels
from convrewrite.cli.networks import given_network
from convrewrite.cli.options import Sources
from convrewrite.errors import UsageError
from convrewrite.loading import import_object
from convrewrite.machine import is_main_process
from convrewrite.pipeline import Result
from convrewrite.progress import Progress, silent
from convrewrite.settings import Recovery


@dataclass(frozen=True, slots=True)
class Asked:
    """The words of the command that are no settings; ``place``: where the recovered result goes."""

    out: Path
    data: str
    model: str | None
    place: Path
    augment: str | None
    labels: Path | None
    resume: bool
    trust: bool

    @property
    def checkpoint(self) -> Path:
        """Where the training stands, beside the result: that is whole at every moment."""
        place = self.place.absolute()
        return place.with_name(f"{place.name}.recovering")


def recovered(asked: Asked, sources: Sources, settings: Recovery, progress: Progress) -> Result | None:
    """The recovered result, not yet written; None in every process but the main one."""
    main = is_main_process()
    report = pipeline.read_report(asked.out / "report.json")
    source = asked.model or _named(report.model, asked.out)
    if main:
        pipeline.check_writable(asked.place, (source, asked.data))
    shapes = ["x".join(map(str, shape)) for shape in report.input_shapes]
    augment = None if asked.augment is None else import_object(asked.augment)
    if augment is not None and not callable(augment):
        raise UsageError(f"--augment {asked.augment}: expected a function of a batch, found {type(augment).__name__}")
    network = given_network(source, replace(sources, input=sources.input or shapes), asked.trust)
    result = pipeline.recover(
        asked.out,
        network.model,
        asked.data,
        network.inputs,
        settings=settings,
        augment=augment,
        labels=None if asked.labels is None else read_labels(asked.labels, settings.memory),
        checkpoint=asked.checkpoint,
        resume=asked.resume,
        reading=Reading(mean=sources.mean, std=sources.std, resize=sources.resize),
        progress=progress if main else silent,
        notes=[note for note in network.notes if note not in report.notes],
    )
    return result if main else None


def _named(model: str, out: Path) -> str:
    """The original as the report names it, if that is a file: what names code is imported only where the user says it."""
    if not Path(model).is_file():
        raise UsageError(
            f"{out}: expected the file of its original, which its report names {model!r}, found no such file; "
            "name it with --model"
        )
    return model
