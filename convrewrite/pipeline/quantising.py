"""A result and its original in int8, compared with both in float32."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from convrewrite.calibration import Calibration, calibrate
from convrewrite.errors import CalibrationError, ModelLoadError, UsageError
from convrewrite.folders import given_path, require_room_beside, resolved, temporary, write_errors
from convrewrite.inputs import ExampleInput, Inputs, in_whole_batches
from convrewrite.meanings import Fidelity, Meaning, outputs_and_origins, read
from convrewrite.modules import private_copy, surroundings_preserved
from convrewrite.onnx_files import outputs_of, size_of
from convrewrite.onnx_graph import exporter_of, graph_inputs, holds_halves
from convrewrite.pipeline.at_a_time import examples_at_a_time
from convrewrite.pipeline.keywords import settings_of
from convrewrite.pipeline.networks import BoundNetwork, ModelSource, at_home, network_of
from convrewrite.pipeline.tried import require_tried
from convrewrite.process import at_work
from convrewrite.progress import Progress, silent
from convrewrite.quantising import quantise_file
from convrewrite.results import ONNX, PLAN, WEIGHTS, add_int8, read_plan, read_report, require_described
from convrewrite.runtime import Baseline, measure_fidelity
from convrewrite.settings import Settings

NAMES = ("original", "rewritten", "int8 of the original", "int8 of the rewritten")


@dataclass(frozen=True, slots=True)
class Int8Row:
    """One of four models: bytes of its file, MACs of one example, its time as a part of the original's, its fidelity to the
    original on held-out inputs, and its relative error against the float32 file it was made from. ``way``: how it was
    quantised."""

    name: str
    bytes: int
    macs: int
    latency: float
    fidelity: Fidelity
    float_error: float
    way: str = ""


def quantise(
    result: str | Path,
    model: ModelSource,
    example_input: ExampleInput | None = None,
    calibration: object = None,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> tuple[Int8Row, ...]:
    """Quantise a result folder's model to static int8, as ``model.int8.onnx`` in that folder, and return a table of four models:
    original, rewritten, and both in int8.

    Args: result: a folder that ``convrewrite optimize`` wrote, with a ``model.onnx``. model, example_input, calibration: the
    original and inputs, as in :func:`convrewrite.optimize`; the example by default has the report's shapes, and inputs must be
    real ones. Values are calibrated on them; weights per channel or per tensor, and scales between stages, are chosen on a
    held-out part. settings: of these ``seed``, ``threads``, ``memory``, ``timeout`` and ``runtime`` count. None: the seed is that
    of the result, so that the same inputs are held out here.

    Raises ModelLoadError for a folder without such a file, or with other weights than were measured, PlanError for another
    original, ExportError for what onnxruntime cannot quantise, UsageError where the file cannot be written, CalibrationError
    without inputs.
    """
    asked, folder, progress = settings_of(settings), given_path(result), progress or silent
    asked.require_files_run()
    if calibration is None or (isinstance(calibration, str) and calibration == "weights"):
        raise CalibrationError(
            "int8: expected inputs to calibrate and to judge on, found none; give real ones (--calib)"
        )
    file = folder / ONNX
    if not os.path.isfile(file):
        raise ModelLoadError(f"{file}: missing; expected a result written by `convrewrite optimize` without --no-onnx")
    report = read_report(folder)
    seed = report.seed if settings is None else asked.seed
    asked = replace(asked, seed=seed, timings=None)  # four files are timed, on this machine
    require_described(folder, report, (PLAN, WEIGHTS, ONNX))
    network = at_home(network_of(model, example_input, asked.timeout, report))
    plan = read_plan(folder / PLAN)
    plan.require_model(network.model, weights=True)
    if holds_halves(network.model):
        raise UsageError(
            "int8: expected a model in float32, which alone can be quantised, found one in half precision; quantise the result "
            "of the float32 model that this was made of"
        )
    with write_errors(folder, "another folder"):
        require_room_beside(resolved(folder) / ONNX)  # before the long work
    with at_work(asked.seed), surroundings_preserved(network.model), write_errors(), temporary() as scratch:
        copy = private_copy(network.model, network.inputs)
        exporter = exporter_of(network.model, report.asked.opset, report.asked.free_axes)
        baseline = Baseline.of(copy, network.inputs, scratch.path, asked.clock, asked.threads, exporter, asked.target)
        data = _data(network, copy, calibration, asked, progress)
        require_tried(file, exporter, data.fit[0], asked.timeout)
        four = _Four(file, copy, baseline, data, plan.meanings(), progress)
        rows = four.rows((report.totals.macs.before, report.totals.macs.after))
        add_int8(folder, report, four.made)
    return rows


def _data(
    network: BoundNetwork, copy: nn.Module, calibration: object, asked: Settings, progress: Progress
) -> Calibration:
    return calibrate(
        copy, network.inputs, calibration, seed=asked.seed, memory=asked.memory, progress=progress,
        batch=examples_at_a_time(copy, network.inputs), graph_inputs=graph_inputs(network.model),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Four:
    """The result's file, the original as a module and as a file, the inputs, and the meanings of outputs in the plan."""

    file: Path
    original: nn.Module
    baseline: Baseline
    data: Calibration
    planned: Mapping[str, Meaning]
    progress: Progress

    @property
    def made(self) -> Path:
        """Where the result's int8 file is made."""
        return self.baseline.folder / "model.int8.onnx"

    def rows(self, macs: tuple[int, int]) -> tuple[Int8Row, ...]:
        """Quantise both models, and measure all four."""
        first, runner = self.baseline.original.path, self.baseline.exporter.runner
        floats, whole = (first, self.file), (self.baseline.folder / "original.int8.onnx", self.made)
        fit, held_out = self._batches(self.data.fit), self._batches(self.data.held_out)
        meanings, ways = self._meanings(first, held_out), []
        for index, (source, place) in enumerate(zip(floats, whole, strict=True)):
            self.progress("int8", index, 2, NAMES[2 + index])
            made = quantise_file(source, place, fit, held_out, original=first, meanings=meanings, runner=runner)
            ways.append(made.way.describe())
        self.progress("int8", 2, 2, "done")
        found = []
        for index, path in enumerate((*floats, *whole)):
            fidelity = measure_fidelity(runner(first), runner(path), held_out, meanings)
            error = measure_fidelity(runner(floats[index % 2]), runner(path), held_out, meanings).worst_error
            way = ways[index - 2] if index > 1 else ""
            latency = self._latency(path)
            found.append(Int8Row(NAMES[index], size_of(path), macs[index % 2], latency, fidelity, error, way))
        return tuple(found)

    def _meanings(self, original: Path, held_out: Sequence[Inputs]) -> dict[str, Meaning] | None:
        """The meanings of outputs of the original's file: as in the plan; for outputs that it does not know, as they look. Where
        their channels lie is told by what gave them in the module."""
        if not held_out:
            return None
        outputs, _ = outputs_of(self.baseline.exporter.runner(original), held_out[0])
        known = {name: meaning for name, meaning in self.planned.items() if name in outputs}
        origins = outputs_and_origins(self.original, held_out[0])[1]
        return read(outputs, {}, known=known, origins=origins, representative=True)

    def _batches(self, batches: tuple[Inputs, ...]) -> list[Inputs]:
        """The batches with as many examples as the files take at a time."""
        taken = self.baseline.exporter.runner(self.file).batch
        return list(batches if taken is None else in_whole_batches(batches, taken))

    def _latency(self, path: Path) -> float:
        baseline, given = self.baseline, self.baseline.exporter.feed(self.baseline.one())
        return baseline.timer.compare_onnx(baseline.original.path, path, given, baseline.threads).ratio
