"""Writes a result that is in a folder in other forms than ONNX."""

from collections.abc import Sequence
from pathlib import Path

from convrewrite.calibration import calibrate, evaluation_inputs
from convrewrite.errors import UsageError
from convrewrite.exports import named_exports
from convrewrite.folders import given_path, temporary
from convrewrite.inputs import ExampleInput
from convrewrite.modules import private_copy, surroundings_preserved
from convrewrite.onnx_graph import exporter_of, graph_inputs
from convrewrite.pipeline.at_a_time import examples_at_a_time
from convrewrite.pipeline.forms import forms_of
from convrewrite.pipeline.keywords import settings_of
from convrewrite.pipeline.networks import ModelSource, at_home, network_of
from convrewrite.pipeline.tried import require_tried
from convrewrite.process import at_work
from convrewrite.progress import Progress, silent
from convrewrite.reporting import Report
from convrewrite.results import (
    ONNX,
    PLAN,
    WEIGHTS,
    add_exports,
    check_addable,
    load,
    read_plan,
    read_report,
    require_described,
)
from convrewrite.settings import Settings


def export_result(
    result: str | Path,
    model: ModelSource,
    example_input: ExampleInput | None = None,
    calibration: object = None,
    *,
    to: str | Sequence[str],
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a result that is in a folder in other forms, into the same folder. Returns its report, which now lists them.

    Args: result: a folder that ``convrewrite optimize`` wrote. model, example_input: the original, as in
    :func:`convrewrite.optimize`; by default random numbers of the report's shapes. calibration: inputs, as in
    :func:`convrewrite.optimize`; the same part is held out as in the result's run. None: random ones. to: names of forms, such as
    ``"openvino"`` (docs/exports.md). settings: of these ``memory`` and ``timeout`` count.

    A form that cannot be written, or that computes something else than the result in torch, leaves no file; the report has the
    reason, and ``report.unwritten`` the reason of the first such form. Raises UsageError for names that are not known, packages
    that are missing and a folder that cannot be written, ModelLoadError for one that holds no result, other weights than were
    measured, or another result by the end, PlanError for another original.
    """
    asked, folder, progress = settings_of(settings), given_path(result), progress or silent
    to = (to,) if isinstance(to, str) else to
    if not named_exports(to):
        raise UsageError("--to: expected the name of a form, as openvino, found none")
    report, plan = read_report(folder), read_plan(folder / PLAN)
    check_addable(folder)
    require_described(folder, report, (PLAN, WEIGHTS, ONNX))
    network = at_home(network_of(model, example_input, asked.timeout, report))
    plan.require_model(network.model, weights=True)
    exporter = exporter_of(network.model, report.asked.opset, report.asked.free_axes)
    file, inputs = folder / ONNX, "weights" if calibration is None else calibration
    with at_work(report.seed), surroundings_preserved(network.model), temporary() as scratch:
        copy = private_copy(network.model, network.inputs)
        taken = examples_at_a_time(copy if exporter.exports else network.model, network.inputs)
        rewritten = load(folder, network.model) if exporter.exports else copy
        data = calibrate(
            copy, network.inputs, inputs, seed=report.seed, memory=asked.memory, progress=progress,
            batch=taken, graph_inputs=graph_inputs(network.model),
        )  # fmt: skip
        evaluation = evaluation_inputs(network.inputs, data, taken).with_meanings(copy, {}, plan.meanings())
        forms = forms_of(tuple(to), copy, network.inputs, exporter, None, report.asked.free_axes)
        onnx = file if file.is_file() else None
        if onnx is not None:
            require_tried(onnx, exporter, evaluation.batches[0], asked.timeout)
        written = forms.write(rewritten, onnx, evaluation, data.fit, scratch.path, progress)
        return add_exports(folder, plan, report, written)
