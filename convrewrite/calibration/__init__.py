"""Which inputs a model is fitted to and evaluated on."""

from convrewrite.calibration.batches import Calibration, Reading, peek_example, read_calibration
from convrewrite.calibration.choose import calibrate, channels_last, evaluation_inputs

__all__ = [
    "Calibration",
    "Reading",
    "calibrate",
    "channels_last",
    "evaluation_inputs",
    "peek_example",
    "read_calibration",
]
