"""What the stages of a run share, gathered on the device where it is used: the inputs, the meanings of outputs, and the weights
of sites' output channels."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from convrewrite.calibration import Calibration, calibrate, channels_last, evaluation_inputs
from convrewrite.errors import CalibrationError
from convrewrite.meanings import Evaluation, Meaning
from convrewrite.onnx_graph import graph_inputs, require_end
from convrewrite.pipeline.narrowing import without_irreplaceable
from convrewrite.planning import require_evaluable
from convrewrite.progress import Progress, Stopwatch
from convrewrite.rewriting import Prepared, Work, output_weights, run_cache_of
from convrewrite.settings import Constraints, Settings

LOG = logging.getLogger(__name__)


def gathered(
    prepared: Prepared,
    calibration: object,
    constraints: Constraints,
    settings: Settings,
    progress: Progress,
    watch: Stopwatch,
    known: Mapping[str, Meaning],
) -> Work:
    """Gather everything on the device of ``prepared``. ``known``: the meanings of outputs that a plan holds."""
    progress("prepare", 0, 1, "inputs")
    with watch.timed("calibrate"):
        data = _calibrated(prepared, calibration, settings, progress)
        LOG.info("inputs: %s, fitted on %d, %d held out", data.source, data.fitted_on, data.held_out_count)
        prepared = without_irreplaceable(prepared, (*data.fit, *data.held_out))
        evaluation = _evaluation(prepared, data, constraints, known)
    weights: dict[str, Tensor] = {}
    if settings.output_weighting and data.fit:
        progress("prepare", 0, 1, "what output channels count for")
        with watch.timed("output weights"):
            weights = output_weights(
                prepared.model, prepared.rewritable, data.fit, settings.seed,
                meanings=evaluation.meanings, at_a_time=prepared.batch,
            )  # fmt: skip
    with watch.timed("look up earlier runs"):
        cache = run_cache_of(prepared, data, evaluation, weights, settings)
    progress("prepare", 1, 1, "done")
    return Work(prepared, data, evaluation, weights, settings, progress, watch, cache)


def _calibrated(prepared: Prepared, calibration: object, settings: Settings, progress: Progress) -> Calibration:
    data = calibrate(
        prepared.model, prepared.inputs, calibration, seed=settings.seed, memory=settings.memory, progress=progress,
        batch=prepared.batch, graph_inputs=graph_inputs(prepared.original),
    ).on(prepared.device)  # fmt: skip
    if settings.int8 and not (data.fit and data.held_out):
        found = f"{data.fitted_on} and none; give more" if data.fit else "none; give real ones"
        raise CalibrationError(f"int8: expected inputs to calibrate and to judge on, found {found} (--calib)")
    require_end(prepared.original, data.fit or data.held_out)
    fit, held_out = (channels_last(prepared.model, part, prepared.batch) for part in (data.fit, data.held_out))
    return replace(data, fit=fit, held_out=held_out)


def _evaluation(
    prepared: Prepared, data: Calibration, constraints: Constraints, known: Mapping[str, Meaning]
) -> Evaluation:
    # Rows of scores may hold NaN where an agreement counts the others.
    by_class = constraints.keep is not None and constraints.keep.measure == "agreement"
    evaluation = evaluation_inputs(prepared.inputs, data, prepared.batch).with_meanings(
        prepared.model, constraints.outputs, known, comparable=not by_class
    )
    for output, meaning in evaluation.meanings.items():
        LOG.info("output %s is taken for %s: %s", output, meaning.kind, meaning.reason)
    if constraints.keep is not None:
        require_evaluable(data, constraints.keep, evaluation.meanings)
    return evaluation
