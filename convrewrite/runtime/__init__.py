"""Export, run, compare, time."""

from convrewrite.runtime.comparison import Verification, measure_fidelity, verify
from convrewrite.runtime.exporting import Exporter, TorchExporter
from convrewrite.runtime.latency import Comparison, compare_onnx, compare_torch
from convrewrite.runtime.measurement import Measured, measure_everything, measure_outputs
from convrewrite.runtime.onnx_export import Exported, export
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.parity import Parity, require_parity
from convrewrite.runtime.timing import THIS_MACHINE, Baseline, Timer, Unmeasured

__all__ = [
    "THIS_MACHINE",
    "Baseline",
    "Comparison",
    "Exported",
    "Exporter",
    "Measured",
    "OptionGraph",
    "Parity",
    "Timer",
    "TorchExporter",
    "Unmeasured",
    "Verification",
    "compare_onnx",
    "compare_torch",
    "export",
    "measure_everything",
    "measure_fidelity",
    "measure_outputs",
    "require_parity",
    "verify",
]
