"""What is measured on a finished model: fidelity to the original, parity in onnxruntime, file sizes, and latency."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from convrewrite.exporting import Exported, export
from convrewrite.fidelity import Fidelity
from convrewrite.inputs import Inputs
from convrewrite.latency import Comparison, compare_onnx, compare_torch
from convrewrite.onnx_placing import size_of
from convrewrite.preparing import Judged, Progress
from convrewrite.verifying import Parity, check_parity, measure_fidelity, require_parity

PARITY_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on the finished model; None where nothing was. ``noise``: its fidelity on nothing better."""

    fidelity: Fidelity
    fidelity_basis: str
    parity: Parity | None = None
    file_bytes: tuple[int, int] | None = None
    onnx_latency: Comparison | None = None
    torch_latency: Comparison | None = None
    notes: tuple[str, ...] = ()
    noise: bool = False

    @property
    def slower(self) -> bool:
        """Whether three quarters of the paired rounds in onnxruntime found the rewritten model slower."""
        return self.onnx_latency is not None and self.onnx_latency.ratio_low > 1


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """Where the result is exported to, and what the file says of itself."""

    path: Path
    metadata: Mapping[str, str]


def measure_outputs(original: nn.Module, rewritten: nn.Module, judged: Judged) -> Measured:
    """Fidelity alone."""
    fidelity = measure_fidelity(original, rewritten, judged.batches, judged.meanings)
    return Measured(fidelity, judged.basis, noise=judged.noise)


def measure_everything(
    original: nn.Module,
    rewritten: nn.Module,
    inputs: Inputs,
    judged: Judged,
    baseline: Exported,
    onnx: OnnxFile,
    threads: int,
    progress: Progress,
) -> Measured:
    """Fidelity, export to ``onnx``, parity on the first of the same inputs, and latency.

    Raises ExportError, and VerificationError without parity.

    ``baseline`` is the original's ONNX file.
    """
    progress("verify", 0, 5, "fidelity")
    outputs = measure_outputs(original, rewritten, judged)
    progress("verify", 1, 5, "export to ONNX")
    after = export(rewritten, inputs, onnx.path, metadata=onnx.metadata)
    progress("verify", 2, 5, "parity of onnxruntime with torch")
    few = tuple(tensor[:PARITY_EXAMPLES] for tensor in judged.batches[0])
    ignored = [name for name, meaning in judged.meanings.items() if not meaning.counts]
    parity = check_parity(rewritten, after.path, few, ignored=ignored)
    require_parity(parity)
    one = tuple(tensor[:1] for tensor in inputs)
    progress("verify", 3, 5, "latency in onnxruntime")
    onnx_latency = compare_onnx(baseline.path, after.path, one if after.dynamic_batch else inputs, threads=threads)
    progress("verify", 4, 5, "latency in torch")
    torch_latency = compare_torch(original, rewritten, one, threads=threads)
    progress("verify", 5, 5, "done")
    sizes = (size_of(baseline.path), size_of(after.path))
    notes = (after.note,) if after.note else ()
    return replace(
        outputs, parity=parity, file_bytes=sizes, onnx_latency=onnx_latency, torch_latency=torch_latency, notes=notes
    )
