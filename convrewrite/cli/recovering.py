"""The command ``recover``: from words to a call of the pipeline, in each of the processes that were launched together."""

from dataclasses import dataclass, replace
from pathlib import Path

from convrewrite import pipeline, results
from convrewrite.calibration import Reading, peek_example, read_labels
from convrewrite.cli.example_inputs import is_whole
from convrewrite.cli.networks import GivenNetwork, given_network
from convrewrite.cli.options import Sources, Towards
from convrewrite.errors import UsageError
from convrewrite.inputs import parameter_names
from convrewrite.loading import import_object
from convrewrite.machine import RANKS, is_main_process
from convrewrite.onnx_graph import is_graph
from convrewrite.places import place_of
from convrewrite.progress import Progress, silent
from convrewrite.results import Result
from convrewrite.settings import Recovery
from convrewrite.tuning import joins_others
from convrewrite.values import shape_text


@dataclass(frozen=True, slots=True)
class RecoverArguments:
    """What the command was given besides settings; ``place``: where the recovered result goes, ``checkpoint``: the file of the
    training's state."""

    out: Path
    data: str
    place: Path
    checkpoint: Path
    towards: Towards
    trust: bool


def recovered(asked: RecoverArguments, sources: Sources, settings: Recovery, progress: Progress) -> Result | None:
    """The recovered result, not yet written; None in every process but the main one."""
    main, towards = is_main_process(), asked.towards
    report = results.read_report(asked.out)
    source = towards.model or named_original(report.model, asked.out)
    if not main:
        _require_joined(settings)
    else:
        results.check_writable(asked.place, (source, asked.data))
    shapes = list(map(shape_text, report.input_shapes))
    augment = None if towards.augment is None else import_object(towards.augment)
    if augment is not None and not callable(augment):
        raise UsageError(f"--augment {towards.augment}: expected a function of a batch, found {type(augment).__name__}")
    network = given_network(source, replace(sources, input=sources.input or shapes), asked.trust, settings.timeout)
    if not sources.input:
        network = with_whole_numbers(network, asked.data)
    result = pipeline.recover(
        asked.out,
        network.model,
        asked.data,
        network.inputs,
        settings=settings,
        augment=augment,
        labels=None if towards.labels is None else read_labels(towards.labels, settings.memory),
        checkpoint=asked.checkpoint,
        resume=towards.resume,
        reading=Reading(mean=sources.mean, std=sources.std, resize=sources.resize),
        progress=progress if main else silent,
        notes=[note for note in network.notes if note not in report.notes],
    )
    return result if main else None


def _require_joined(settings: Recovery) -> None:
    """Raise UsageError for a process that is not the main one and that would train alone: its result would be lost."""
    if not joins_others(None if settings.device is None else place_of(settings.device)):
        raise UsageError(
            "recover: expected LOCAL_RANK beside the number of this process, by which accelerate joins those that were launched "
            f"together, found none; use accelerate launch or torchrun, or, for one process alone, unset {', '.join(RANKS)}"
        )


def with_whole_numbers(network: GivenNetwork, data: str) -> GivenNetwork:
    """The network with an example that has whole numbers where the inputs in a file have them, as these may be indices: the
    shapes in a report do not tell."""
    if is_graph(network.model):  # which states the types of its inputs
        return network
    own = network.inputs
    named = parameter_names(network.model)[: len(own)]
    # What *args takes, as files of inputs name it.
    unnamed = [f"input.{place}" for place in range(len(named), len(own))]
    found = peek_example(data, (*named, *unnamed)) or own
    given = tuple(
        there.expand_as(noise) if is_whole(there) and there.shape[1:] == noise.shape[1:] else noise
        for noise, there in zip(own, found, strict=True)
    )
    return replace(network, inputs=given)


def named_original(model: str, out: Path) -> str:
    """The original as the report names it, if that is a file: a name of code is imported only where the user gives it."""
    if not Path(model).is_file():
        raise UsageError(
            f"{out}: expected the file of its original, found that its report names {model!r}, which is no file here; "
            "name the file, or the code that builds the original, with --model"
        )
    return model
