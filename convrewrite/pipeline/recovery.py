"""Recovery: a result is trained towards its original by distillation and verified anew, and its report says so."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from convrewrite.calibration import (
    Calibration,
    Reading,
    checked_calibration,
    read_inputs,
    require_order,
    whole_inputs,
)
from convrewrite.errors import UsageError
from convrewrite.folders import Scratch, given_path, temporary
from convrewrite.graph import apply_lifts
from convrewrite.inputs import ExampleInput, Inputs, moved, parameter_names
from convrewrite.loading import import_object
from convrewrite.meanings import Evaluation, asked_meanings
from convrewrite.modules import Snapshot, copy_model, preserved, put_on, surroundings_preserved
from convrewrite.onnx_files import Provenance
from convrewrite.onnx_graph import exporter_of, graph_inputs, is_graph, regions_of
from convrewrite.pipeline.at_a_time import examples_at_a_time
from convrewrite.pipeline.identity import UNTOLD, augmentation_of, identity_of
from convrewrite.pipeline.keywords import RecoverKeywords, RecoveryExtras, asked_of, signed
from convrewrite.pipeline.networks import BoundNetwork, ModelSource, at_home, network_of
from convrewrite.pipeline.notes import NOT_MEASURED, NOT_TIMED, NOT_TRIED, SITES_AS_FITTED, unmeasured
from convrewrite.pipeline.workplace import HOME
from convrewrite.places import described, out_of_memory, place_of, place_of_model
from convrewrite.planning import Fingerprint, Plan
from convrewrite.process import at_work
from convrewrite.progress import Stopwatch
from convrewrite.reporting import RecoveredSummary, Report, recovered_report
from convrewrite.results import (
    ONNX,
    PLAN,
    WEIGHTS,
    Result,
    files_of,
    kept,
    left_out,
    load,
    read_plan,
    read_report,
    require_described,
)
from convrewrite.runtime import Baseline, Measured, measure_everything, measure_outputs
from convrewrite.settings import Recovery
from convrewrite.state import named_parameters_of
from convrewrite.structures import Structure
from convrewrite.targets import target_of
from convrewrite.tuning import (
    Checkpoint,
    Distilled,
    Pace,
    Processes,
    Training,
    TrainingInputs,
    accelerated,
    keeps_outputs,
    require_place,
    resumed,
    task_of,
)
from convrewrite.values import counted

EVERY = 100_000_000
"""A limit on inputs that are read, larger than any number of them: their size is bounded by the memory."""

SPLIT_ANEW = (
    "{source}: expected {least} inputs or more both in fit and in held_out, found {fit} and {held_out}, so the recovery itself "
    "chose what to hold out: the result before may be fitted to some of these inputs, and then looks better than it is"
)


@dataclass(frozen=True, slots=True)
class Came:
    """A result before recovery: its plan and report, the rewritten model, its ONNX file with its weights, and files of further
    forms. The model may be the caller's own."""

    plan: Plan
    report: Report
    model: nn.Module
    onnx: Sequence[Path]
    further: Sequence[Path]


@dataclass(slots=True)
class Recovering:
    """A recovery under way. ``original`` and ``rewritten`` are its own copies; ``scratch`` is for files of the result, made early
    so that it fails before the training if none can be written."""

    came: Came
    network: BoundNetwork
    original: nn.Module
    rewritten: nn.Module
    asked: Recovery
    extras: RecoveryExtras
    scratch: Scratch = field(default_factory=temporary)
    watch: Stopwatch = field(default_factory=Stopwatch)
    notes: list[str] = field(default_factory=list)


@signed
def recover(
    result: "Result | str | Path",
    model: ModelSource,
    data: object,
    example_input: ExampleInput | None = None,
    *,
    settings: Recovery | None = None,
    **keywords: Unpack[RecoverKeywords],
) -> Result:
    """Train a result towards its original on inputs without labels. The new result is never worse on held-out inputs.

    Where several processes were launched together (accelerate launch, torchrun), all call this; each then has the recovered
    model, and only the main one has measured it.

    Args: result: what :func:`convrewrite.optimize` returned, or a folder in which that was saved. It is not touched. model: the
    original, as :func:`convrewrite.optimize` took it, with the weights that it had. data: inputs, in any form that
    :func:`convrewrite.calibration.read_calibration` takes. A fifth of them, 2,048 at most, is held out; of a
    :class:`convrewrite.calibration.Calibration`, what it holds out itself, 2,048 at most. example_input: as in
    :func:`convrewrite.optimize`; by default random numbers of the shapes in the report. settings: all of
    :class:`convrewrite.settings.Recovery` as one value, instead of its fields. keywords: the fields of
    :class:`convrewrite.settings.Recovery`; ``augment``, a function that changes a batch of inputs; ``labels``, one whole number
    for each input (for a Calibration, in the order of ``fit`` and ``held_out``), whose cross-entropy is added to the loss;
    ``checkpoint``, a file for the state of the training, from which it goes on unless ``resume=False``; ``reading``, how inputs
    are read, with the recovery's own seed and memory; ``structures``, ``progress`` and ``notes`` as in
    :func:`convrewrite.optimize`.

    Raises:
        UsageError, ModelError, ProcessLostError or VerificationError, each saying what to do (see :mod:`convrewrite.errors`).
    """
    asked, extras = asked_of(settings, keywords)
    if extras.checkpoint is not None:
        require_place(Path(extras.checkpoint))
    came = _came(result, model, example_input, extras.structures, asked.timeout)
    network = _network(came.report, model, example_input, asked.timeout)
    came.plan.require_model(network.model, weights=True)
    _require_gradients(network)
    _require_written(network, asked)
    with at_work(asked.seed), surroundings_preserved(network.model):
        plan, origin, network = came.plan, place_of_model(network.model), at_home(network)
        original = apply_lifts(network.model, plan.lifted) if plan.lifted else copy_model(network.model)
        run = Recovering(came, network, original, put_on(HOME, copy_model(came.model)), asked, extras)
        run.notes += [*network.notes, *extras.notes]
        before = Snapshot(run.rewritten, parameters=False)
        with accelerated(None if asked.device is None else place_of(asked.device)) as processes:
            distilled, given, evaluation = _train(run, data, processes)
            main = processes.index == 0
        before.restore()  # buffers that a forward updates would hold what training left in them, with its gradients
        result = _finished(run, distilled, given, evaluation, main)
        return replace(result, model=put_on(origin, result.model))


def _came(
    result: "Result | str | Path",
    model: ModelSource,
    example: ExampleInput | None,
    structures: Sequence[Structure],
    timeout: float,
) -> Came:
    """The result, opened. Raises PlanError and ModelLoadError for folders that hold something else, or other weights than were
    measured."""
    if isinstance(result, Result):
        return Came(result.plan, result.report, result.model, *files_of(result))
    folder = given_path(result)
    plan, report = read_plan(folder / PLAN), read_report(folder)
    require_described(folder, report, (PLAN, WEIGHTS, ONNX))
    network = _network(report, model, example, timeout)
    return Came(plan, report, load(folder, network.model, tuple(structures)), *files_of(folder))


def _network(report: Report, model: ModelSource, example: ExampleInput | None, timeout: float) -> BoundNetwork:
    """The original with its inputs."""
    return network_of(model, example, timeout, report)


def _require_gradients(network: BoundNetwork) -> None:
    """Raise UsageError for an ONNX graph of which onnxruntime runs a part, through which no gradient passes."""
    regions = regions_of(network.model)
    if regions:
        raise UsageError(
            f"{network.name}: expected a graph that torch computes throughout, found parts that onnxruntime runs "
            f"({', '.join(regions[:3])}), through which no gradient passes; recover the module that it was exported from"
        )


def _require_written(network: BoundNetwork, asked: Recovery) -> None:
    """Raise UsageError where weights would be trained that cannot be written: into an ONNX graph only rewritten convolutions are
    put back."""
    if asked.everything and is_graph(network.model):
        raise UsageError(
            f"{network.name}: expected to train rewritten sites alone, as all else in an ONNX graph stays as it came, found "
            "--all; leave it out, or recover the module that the graph was exported from"
        )


def _train(run: Recovering, data: object, processes: Processes) -> tuple[Distilled, TrainingInputs, Evaluation]:
    """Read inputs, train, and leave the best in ``run.rewritten``, on the device of its original."""
    inputs, source, own = _inputs(run, data)
    taken = examples_at_a_time(run.original, run.network.inputs)
    least, others = taken or 1, len(inputs[0]) - (own or 0)
    if own is not None and min(own, others) < least:
        run.notes.append(SPLIT_ANEW.format(source=source, least=least, fit=own, held_out=others))
        own = None
    if taken is not None:
        run.asked = replace(run.asked, batch=taken)
    asked, extras, plan = run.asked, run.extras, run.came.plan
    given = TrainingInputs.split(inputs, extras.labels, asked.seed, taken, own)
    held_out = given.held_out_batches(min(asked.batch, len(given.held_out[0])))
    basis = f"measured on {counted(len(given.held_out[0]), 'held-out input')} of {source}"
    said = asked_meanings(asked.outputs)
    evaluation = Evaluation(held_out, basis).with_meanings(run.original, said, plan.meanings())
    sites = {site.name: site.batch_norm for site in plan.sites if site.option is not None}
    lasts = _channels_last(run.rewritten)
    with run.watch.timed("recover"):
        task = task_of(run.original, run.rewritten, sites, given, evaluation.meanings, asked, processes, extras.augment)
        augment = augmentation_of(extras, run.notes)
        run_of = identity_of(plan, run.came.model, given, asked, evaluation.meanings, augment)
        training = Training(task, _pace(asked, task.examples.steps_of_epoch), processes, run_of)
        training.tell = _teller(extras, asked)
        training.keep = None if augment == UNTOLD else _keeper(extras, processes)
        distilled = _trained(run, training, keeps_outputs(task, asked.memory))
        run.asked = replace(asked, batch=task.examples.batch)  # what it was, with few inputs or several processes
    place = place_of_model(run.network.model)
    for model in (run.original, run.rewritten):
        model.to(device=place).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for name in lasts:
        tensor = operator.attrgetter(name)(run.rewritten)
        tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return distilled, given, evaluation


def _channels_last(model: nn.Module) -> list[str]:
    """The names of the tensors of a model that lie with their channels last, as training may lay out all of them."""
    named = [(name, t) for name, t in (*named_parameters_of(model), *model.named_buffers()) if t.dim() == 4]
    return [name for name, t in named if not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)]


def _trained(run: Recovering, training: Training, keep_outputs: bool) -> Distilled:
    """Train. Raises UsageError where a device has no room for it."""
    try:
        return training.train(_resumed(run, training), keep_outputs=keep_outputs)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UsageError(
            f"batch {run.asked.batch}: expected room for so many inputs in a step on {described(training.processes.device)}, "
            "found none left; take fewer, or device cpu"
        ) from error


def _inputs(run: Recovering, data: object) -> tuple[Inputs, str, int | None]:
    """All inputs, in their order, and where they come from; of a Calibration also how many are in ``fit``, which come first."""
    if isinstance(data, Calibration):
        model, count = run.network.model, len(run.network.inputs)
        checked = checked_calibration(data, model, count, graph_inputs(model))
        run.notes += checked.notes[len(data.notes) :]
        return moved(whole_inputs(checked), HOME), data.source, checked.fitted_on
    example, extras = run.network.inputs, run.extras
    if extras.labels is not None:
        require_order(data)
    reading = extras.reading or Reading()
    how = replace(reading, limit=reading.limit or EVERY, seed=run.asked.seed, memory=run.asked.memory)
    names = parameter_names(run.network.model)[: len(example)]
    read = read_inputs(data, example, how, import_object, names)
    if extras.labels is not None and read.drawn:
        raise UsageError(
            f"labels: expected all inputs to be read, whose order labels have, found reading with limit={reading.limit}, which "
            f"draws some of {read.source} at random; choose inputs and labels before, and leave the limit out"
        )
    run.notes += read.notes
    return read.inputs, read.source, None


def _pace(asked: Recovery, steps_of_epoch: int) -> Pace:
    if asked.epochs is not None:
        return Pace(asked.rate, steps=max(1, round(asked.epochs * steps_of_epoch)))
    return Pace(asked.rate, seconds=60 * asked.time)


def _keeper(extras: RecoveryExtras, processes: Processes) -> Any:
    if extras.checkpoint is None or processes.index:
        return None
    path = Path(extras.checkpoint)
    return lambda checkpoint: checkpoint.save(path)


def _teller(extras: RecoveryExtras, asked: Recovery) -> Any:
    unit = "epoch" if asked.epochs == 1 else "epochs"
    what = f"{asked.time:g} min" if asked.epochs is None else f"{asked.epochs:g} {unit}"
    return lambda progress, text: extras.listener("recover", round(100 * progress), 100, f"{what}: {text}")


def _resumed(run: Recovering, training: Training) -> Checkpoint | None:
    path = run.extras.checkpoint
    if path is None or not run.extras.resume:
        return None
    return resumed(Path(path), training, run.notes)


def _finished(
    run: Recovering, distilled: Distilled, given: TrainingInputs, evaluation: Evaluation, main: bool
) -> Result:
    """The recovered model, verified, with its report; where nothing was gained, the model as it was."""
    scratch, plan, network = run.scratch, run.came.plan, run.network
    asked = run.came.report.asked
    exporter = exporter_of(network.model, asked.opset, asked.free_axes)
    source = exporter.source
    provenance = Provenance(
        str(plan.model), str(Fingerprint.of(run.rewritten)), plan.tool_version, evaluation.meanings, source
    )
    onnx = None
    with run.watch.timed("verify"), preserved(run.rewritten):
        if run.asked.measure and main:
            baseline = Baseline.of(
                run.original,
                network.inputs,
                scratch.path,
                run.asked.clock,
                run.asked.threads,
                exporter,
                target_of(run.came.report.runtime),
            )
            metadata, progress = provenance.metadata(), run.extras.listener
            measured = measure_everything(
                run.original, run.rewritten, network.inputs, evaluation, baseline, metadata, progress
            )
            onnx = baseline.result
        else:
            measured = measure_outputs(run.original, run.rewritten, evaluation)
            if not exporter.exports and main:
                onnx = scratch.path / ONNX
                exporter.rewritten(run.rewritten, network.inputs, onnx, provenance.metadata())
    unchanged, came = distilled.best.step == 0, run.came
    run.notes += [] if unchanged else left_out(came.further)
    report = _report(run, distilled, given, measured)
    still = (*came.further, *(came.onnx if onnx is None else ())) if unchanged and main else ()
    return Result(run.rewritten, plan, report, onnx, scratch, kept(still, scratch.path))


def _report(run: Recovering, distilled: Distilled, given: TrainingInputs, measured: Measured) -> Report:
    came, asked = run.came, run.asked
    best = distilled.best
    summary = RecoveredSummary(
        before=distilled.before,
        after=best.effect,
        steps=distilled.steps,
        kept_step=best.step,
        minutes=distilled.seconds / 60,
        trained_on=len(given.train[0]),
        held_out=len(given.held_out[0]),
        settings=_recipe(asked, run.extras),
        curve=tuple((point.step, point.effect) for point in distilled.curve),
        ended=distilled.ended,
    )
    data = Calibration((given.train,), (given.held_out,), "data", "the inputs of the recovery")
    earlier = came.report.model_copy(update={"notes": _still_true(came.report.notes, asked.measure, summary.unchanged)})
    return recovered_report(
        earlier,
        plan=came.plan,
        asked=asked,
        measured=measured,
        data=data,
        summary=summary,
        notes=[*run.notes, *([] if asked.measure else [unmeasured(run.network.model)])],
        seconds=run.watch.seconds,
    )


def _still_true(notes: Sequence[str], measured: bool, unchanged: bool) -> tuple[str, ...]:
    """The notes on what came in, without what a recovery that ``measured`` it anew, or changed it, made untrue."""
    timed = (
        note.removesuffix(NOT_TIMED) if measured else note for note in notes if note not in (NOT_MEASURED, NOT_TRIED)
    )
    return tuple(note if unchanged else note.removesuffix(SITES_AS_FITTED) for note in timed)


def _recipe(asked: Recovery, extras: RecoveryExtras) -> dict[str, int | float | str]:
    """The recipe in the form that the report shows."""
    recipe: dict[str, int | float | str] = (
        {"epochs": asked.epochs} if asked.epochs is not None else {"minutes": asked.time}
    )
    recipe |= {"rate": asked.rate, "batch": asked.batch, "temperature": asked.temperature, "features": asked.features}
    recipe |= {"trained": "all parameters" if asked.everything else "rewritten sites", "seed": asked.seed}
    if extras.augment is not None:
        recipe["augmentation"] = getattr(extras.augment, "__qualname__", type(extras.augment).__qualname__)
    if isinstance(extras.labels, Tensor):
        recipe["labels"] = "given"
    return recipe
