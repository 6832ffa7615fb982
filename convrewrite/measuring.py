"""What is measured on a finished model: fidelity to the original, parity in onnxruntime, file sizes, and latency."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from convrewrite.calibration import Calibration
from convrewrite.exporting import Exported, export
from convrewrite.inputs import Inputs
from convrewrite.latency import Comparison, compare_onnx, compare_torch
from convrewrite.preparing import Progress, judging_inputs
from convrewrite.verifying import Fidelity, Parity, check_parity, measure_fidelity, require_parity


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on the finished model; None where nothing was."""

    fidelity: Fidelity
    fidelity_basis: str
    parity: Parity | None = None
    file_bytes: tuple[int, int] | None = None
    onnx_latency: Comparison | None = None
    torch_latency: Comparison | None = None
    notes: tuple[str, ...] = ()

    @property
    def slower(self) -> bool:
        """Whether three quarters of the paired rounds in onnxruntime found the rewritten model slower."""
        return self.onnx_latency is not None and self.onnx_latency.ratio_low > 1


def measure_outputs(original: nn.Module, rewritten: nn.Module, inputs: Inputs, data: Calibration) -> Measured:
    """Fidelity alone, on held-out inputs where there are any."""
    batches, basis = judging_inputs(inputs, data)
    return Measured(measure_fidelity(original, rewritten, batches), basis)


def measure_everything(
    original: nn.Module,
    rewritten: nn.Module,
    inputs: Inputs,
    data: Calibration,
    baseline: Exported,
    onnx: Path,
    threads: int,
    progress: Progress,
) -> Measured:
    """Fidelity, export to ``onnx``, parity and latency. Raises ExportError, and VerificationError without parity.

    ``baseline`` is the original's ONNX file.
    """
    progress("verify", 0, 5, "fidelity")
    outputs = measure_outputs(original, rewritten, inputs, data)
    progress("verify", 1, 5, "export to ONNX")
    after = export(rewritten, inputs, onnx)
    progress("verify", 2, 5, "parity of onnxruntime with torch")
    batches, _ = judging_inputs(inputs, data)
    parity = check_parity(rewritten, after.path, tuple(tensor[:8] for tensor in batches[0]))
    require_parity(parity)
    one = tuple(tensor[:1] for tensor in inputs)
    progress("verify", 3, 5, "latency in onnxruntime")
    onnx_latency = compare_onnx(baseline.path, after.path, one if after.dynamic_batch else inputs, threads=threads)
    progress("verify", 4, 5, "latency in torch")
    torch_latency = compare_torch(original, rewritten, one, threads=threads)
    progress("verify", 5, 5, "done")
    sizes = (baseline.path.stat().st_size, after.path.stat().st_size)
    notes = (after.note,) if after.note else ()
    return Measured(outputs.fidelity, outputs.fidelity_basis, parity, sizes, onnx_latency, torch_latency, notes)
