"""What is measured on a finished model: fidelity to the original, parity in onnxruntime, file sizes, and latency."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from convrewrite.inputs import Inputs, in_whole_batches
from convrewrite.meanings import Evaluation, Fidelity
from convrewrite.modules import eval_mode
from convrewrite.onnx_files import OnnxModel, outputs_of, size_of
from convrewrite.progress import Progress
from convrewrite.runtime.comparison import measure_fidelity
from convrewrite.runtime.exporting import Exporter
from convrewrite.runtime.latency import ONNXRUNTIME
from convrewrite.runtime.onnx_export import Exported
from convrewrite.runtime.parity import OutputParity, Parity, check_parity, check_target, require_parity
from convrewrite.runtime.timing import Baseline
from convrewrite.targets import Comparison, Program

LOG = logging.getLogger(__name__)

PARITY_EXAMPLES = 8
"""Examples that parity is decided on, unless a file takes more at a time."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on the finished model; None where nothing was. ``noise``: fidelity was measured on noise only;
    ``predicted_saving``: the part of the time that the options save according to their own times; ``original_seconds``: what the
    original takes where those were measured, unless that was here; ``original_runtime``: in which runtime. ``onnx_latency`` is
    that in the target, onnxruntime unless another was asked for. All seconds are those of one example."""

    fidelity: Fidelity
    fidelity_basis: str
    parity: Parity | None = None
    file_bytes: tuple[int, int] | None = None
    onnx_latency: Comparison | None = None
    torch_latency: Comparison | None = None
    notes: tuple[str, ...] = ()
    noise: bool = False
    predicted_saving: float | None = None
    original_seconds: float | None = None
    original_runtime: str | None = None

    @property
    def slower(self) -> bool:
        """Whether three quarters of the paired rounds, in the runtime that was asked for, found the rewritten model slower."""
        return self.onnx_latency is not None and self.onnx_latency.ratio_low > 1


def measure_outputs(original: nn.Module, rewritten: nn.Module, evaluation: Evaluation) -> Measured:
    """Fidelity alone."""
    fidelity = measure_fidelity(original, rewritten, evaluation.batches, evaluation.meanings)
    return Measured(fidelity, evaluation.basis, noise=evaluation.noise)


def measure_files(exporter: Exporter, files: tuple[Path, Path], evaluation: Evaluation, batch: int | None) -> Measured:
    """Fidelity of one file to another in onnxruntime; ``batch``: the examples they take at a time, None for any number."""
    exporter.require_source()
    original, rewritten = (exporter.runner(file) for file in files)
    batches = evaluation.batches if batch is None else in_whole_batches(evaluation.batches, batch)
    fidelity = measure_fidelity(original, rewritten, batches, evaluation.meanings)
    given = sum(len(inputs[0]) for inputs in evaluation.batches)
    fidelity = replace(fidelity, examples=min(fidelity.examples, given))
    return Measured(fidelity, f"{evaluation.basis}, the files in onnxruntime", noise=evaluation.noise)


def measure_everything(
    original: nn.Module,
    rewritten: nn.Module,
    inputs: Inputs,
    evaluation: Evaluation,
    baseline: Baseline,
    metadata: Mapping[str, str],
    progress: Progress,
) -> Measured:
    """Fidelity, export, parity on the first of the same inputs, and latency; ``metadata`` is what the ONNX file says of itself.

    Raises ExportError, and VerificationError without parity.
    """
    exporter, before = baseline.exporter, baseline.original.path
    progress("verify", 0, 5, "export to ONNX")
    after = exporter.rewritten(rewritten, inputs, baseline.result, metadata)
    progress("verify", 1, 5, "parity of onnxruntime with torch")
    parity = _parity(rewritten, evaluation, baseline, after)
    require_parity(parity)
    LOG.info("parity of the ONNX file with torch holds")
    progress("verify", 2, 5, "fidelity")
    if exporter.exports:
        outputs = measure_outputs(original, rewritten, evaluation)
    else:
        outputs = measure_files(exporter, (before, after.path), evaluation, after.batch)
    one = baseline.one()
    if not baseline.elsewhere:
        progress("verify", 3, 5, f"latency in {baseline.target.name}")
    onnx_latency = None if baseline.elsewhere else _latency(original, rewritten, baseline, after)
    both = baseline.eager and exporter.exports and baseline.target.takes == "onnx" and not baseline.elsewhere
    if both:
        progress("verify", 4, 5, "latency in torch")
    torch_latency = (
        _of_one(baseline.timer.compare_torch(original, rewritten, one, baseline.threads), one) if both else None
    )
    exporter.require_source()  # all the while its file was run
    progress("verify", 5, 5, "done")
    sizes = (size_of(before), size_of(after.path))
    notes = (after.note,) if after.note else ()
    return replace(
        outputs, parity=parity, file_bytes=sizes, onnx_latency=onnx_latency, torch_latency=torch_latency, notes=notes,
    )  # fmt: skip


def _latency(original: nn.Module, rewritten: nn.Module, baseline: Baseline, after: Exported) -> Comparison:
    """Latency in the target, on one example where both files take any number."""
    timer, threads = baseline.timer, baseline.threads
    if baseline.target.takes == "module":
        one = baseline.one()
        return _of_one(timer.compare_torch(original, rewritten, one, threads), one)
    one = baseline.one(after.dynamic_batch)
    return _of_one(timer.compare_onnx(baseline.original.path, after.path, baseline.exporter.feed(one), threads), one)


def _of_one(found: Comparison, taken: Inputs) -> Comparison:
    """The comparison in seconds of one example, where several are taken at a time."""
    return replace(found, seconds_a=found.seconds_a / len(taken[0]), seconds_b=found.seconds_b / len(taken[0]))


def _few(inputs: Inputs, batch: int | None) -> Inputs:
    """Enough examples to judge parity by, and no fewer than a file takes at a time."""
    few = tuple(tensor[: max(PARITY_EXAMPLES, batch or 0)] for tensor in inputs)
    return few if batch is None or len(few[0]) >= batch else in_whole_batches((few,), batch)[0]


def _parity(rewritten: nn.Module, evaluation: Evaluation, baseline: Baseline, after: Exported) -> Parity:
    """Parity of onnxruntime with torch, and of another target with torch, or with onnxruntime where the model is a graph."""
    meanings, exporter, target = evaluation.meanings, baseline.exporter, baseline.target
    file = exporter.runner(after.path)
    few = _few(evaluation.batches[0], after.batch or file.batch)
    found = check_parity(
        rewritten,
        file,
        few,
        batch=after.batch,
        meanings=meanings,
        free=exporter.beyond,
    )
    if target == ONNXRUNTIME or baseline.elsewhere:
        return found
    given = exporter.feed(few if after.batch is None and after.dynamic_batch else baseline.inputs)
    with eval_mode(rewritten):
        reference = rewritten if exporter.exports else OnnxModel(after.path)
        expected, _ = outputs_of(reference, given)
    listed = reference.output_names if isinstance(reference, OnnxModel) else ()
    program = Program(after.path, rewritten)
    others: tuple[OutputParity, ...] = check_target(
        expected, program, given, target, threads=baseline.threads, meanings=meanings, listed=listed
    )
    return Parity((*found.outputs, *others), found.inputs_checked)
