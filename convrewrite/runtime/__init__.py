"""Export, run, compare, time."""

from convrewrite.runtime.comparison import Verification, measure_fidelity, verify
from convrewrite.runtime.exporting import Exporter, TorchExporter
from convrewrite.runtime.latency import compare_programs
from convrewrite.runtime.measurement import Measured, measure_everything, measure_outputs
from convrewrite.runtime.onnx_export import Exported, export
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.parity import RunningParity, require_parity
from convrewrite.runtime.profiling import OptionsAt, ProfiledTimer
from convrewrite.runtime.timing import THIS_MACHINE, Baseline, Timer, Unmeasured

__all__ = [
    "THIS_MACHINE",
    "Baseline",
    "Exported",
    "Exporter",
    "Measured",
    "OptionGraph",
    "OptionsAt",
    "ProfiledTimer",
    "RunningParity",
    "Timer",
    "TorchExporter",
    "Unmeasured",
    "Verification",
    "compare_programs",
    "export",
    "measure_everything",
    "measure_fidelity",
    "measure_outputs",
    "require_parity",
    "verify",
]
