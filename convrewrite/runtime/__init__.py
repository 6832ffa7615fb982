"""Export, run, compare, time. The only wing that imports onnx and onnxruntime."""

from convrewrite.runtime.comparison import Verification, measure_fidelity, verify
from convrewrite.runtime.exporting import Exporter, TorchExporter
from convrewrite.runtime.latency import Comparison, compare_onnx, compare_torch
from convrewrite.runtime.measurement import Measured, measure_everything, measure_outputs
from convrewrite.runtime.onnx_export import Exported, export
from convrewrite.runtime.onnx_model import ELEMENT_TYPES, OnnxModel
from convrewrite.runtime.onnx_placing import is_weights_of, new_name_of_weights, place
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.parity import OutputParity, Parity, check_parity, require_parity
from convrewrite.runtime.probing import SECONDS as PROBE_SECONDS
from convrewrite.runtime.probing import require_well_behaved
from convrewrite.runtime.provenance import Provenance
from convrewrite.runtime.timing import THIS_MACHINE, Baseline, Timer, Unmeasured

__all__ = [
    "ELEMENT_TYPES",
    "PROBE_SECONDS",
    "THIS_MACHINE",
    "Baseline",
    "Comparison",
    "Exported",
    "Exporter",
    "Measured",
    "OnnxModel",
    "OptionGraph",
    "OutputParity",
    "Parity",
    "Provenance",
    "Timer",
    "TorchExporter",
    "Unmeasured",
    "Verification",
    "check_parity",
    "compare_onnx",
    "compare_torch",
    "export",
    "is_weights_of",
    "measure_everything",
    "measure_fidelity",
    "measure_outputs",
    "new_name_of_weights",
    "place",
    "require_parity",
    "require_well_behaved",
    "verify",
]
