"""The command ``sweep``: from words to calls of the pipeline, one for each model."""

from collections.abc import Iterator, Sequence
from typing import Any

from convrewrite import pipeline, values
from convrewrite.cli.networks import given_network
from convrewrite.cli.options import Sources, Sweeping, calibration_of, notes_on
from convrewrite.errors import UsageError
from convrewrite.loading import import_object
from convrewrite.pipeline import Frontier, Sweep
from convrewrite.progress import Progress
from convrewrite.rules import resolve
from convrewrite.settings import BUDGETS, GIGABYTE, MEMORY, Settings
from convrewrite.targets import DEFAULT
from convrewrite.values import PROBE_SECONDS, shape_text


def swept(
    models: Sequence[str],
    rules: Sequence[str],
    asked: Sweeping,
    sources: Sources,
    settings: Settings,
    trust: bool,
    progress: Progress,
) -> tuple[Sweep, list[str], list[str]]:
    """The sweeps of all models side by side, the words that a command needs to make a point again, and notes on the models and
    their inputs."""
    resource: Any = asked.resource
    if resource not in BUDGETS:
        raise UsageError(f"--resource: expected {', '.join(BUDGETS)}, found {values.shown(resource)}")
    if len(set(models)) < len(models):
        raise UsageError("MODEL: expected each model once, found one more than once")
    metric = None if asked.metric is None else import_object(asked.metric)
    if metric is not None and not callable(metric):
        raise UsageError(f"--metric {asked.metric}: expected a function of a model, found {type(metric).__name__}")
    chosen, notes = resolve(rules), dict[str, None]()

    def frontiers(names: Sequence[str]) -> Iterator[Frontier]:
        for model in names:
            network = given_network(model, sources, trust, settings.timeout)
            data = calibration_of(sources, network.model, network.inputs, settings.seed, settings.memory)
            said = (*network.notes, *notes_on(data))
            notes.update(dict.fromkeys(note if len(models) == 1 else f"{model}: {note}" for note in said))
            yield pipeline.frontier_of(
                network.model, network.inputs, chosen, data, asked.budgets, resource, metric, settings=settings,
                name=model, notes=network.notes, progress=progress,
            )  # fmt: skip

    if asked.cluster is None:  # which opens all of them first; here one is held at a time
        for _ in frontiers(models[1:]):
            pass  # what is wrong with a later one shows before the long work on the first
    found = pipeline.sweep_all(frontiers(models), asked.cluster, progress)
    return found, _words(sources, settings, trust), list(notes)


def _words(sources: Sources, settings: Settings, trust: bool) -> list[str]:
    """The options about the model and its inputs, as ``apply`` takes them."""
    words = [word for text in sources.input or () for word in ("--input", text)]
    for name, text in (
        ("--factory", sources.factory),
        ("--calib", sources.calib),
        ("--mean", sources.mean and ",".join(map(str, sources.mean))),
        ("--std", sources.std and ",".join(map(str, sources.std))),
        ("--resize", sources.resize and shape_text(sources.resize)),
        ("--runtime", None if settings.runtime == DEFAULT else settings.runtime),
        ("--timings", settings.timings),
        ("--device", settings.device),
        ("--timeout", None if settings.timeout == PROBE_SECONDS else repr(float(settings.timeout)).removesuffix(".0")),
    ):
        words += [name, text] if text else []
    words += ["--memory", _gigabytes(settings.memory)] if settings.memory != MEMORY else []
    words += ["--threads", str(settings.threads)] if settings.threads != 1 else []
    words += ["--trust"] if trust else []
    words += [] if settings.measure else ["--no-onnx"]
    return words + (["--refine"] if settings.refine else [])


def _gigabytes(size: int) -> str:
    """The shortest text that ``--memory`` reads as so many bytes."""
    texts = (f"{size / GIGABYTE:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if int(float(text) * GIGABYTE) == size)
