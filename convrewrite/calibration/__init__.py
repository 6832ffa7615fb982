"""Which inputs a model is fitted to and evaluated on."""

from convrewrite.calibration.batches import Calibration, peek_example, read_calibration, read_inputs
from convrewrite.calibration.choose import (
    calibrate,
    channels_last,
    checked_calibration,
    evaluation_inputs,
    whole_inputs,
)
from convrewrite.calibration.labels import read_labels, require_order
from convrewrite.calibration.reading import Reading

__all__ = [
    "Calibration",
    "Reading",
    "calibrate",
    "channels_last",
    "checked_calibration",
    "evaluation_inputs",
    "peek_example",
    "read_calibration",
    "read_inputs",
    "read_labels",
    "require_order",
    "whole_inputs",
]
