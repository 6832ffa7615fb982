"""What all stages of one run share."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from convrewrite.calibration import Calibration
from convrewrite.preparing import Judged, Prepared, Progress, Settings
from convrewrite.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class Work:
    """The model and its sites, the inputs, what the result is judged by, the weights of the sites' outputs, how to work, and
    whom to tell."""

    prepared: Prepared
    data: Calibration
    judged: Judged
    weights: Mapping[str, Tensor]
    settings: Settings
    progress: Progress
    watch: Stopwatch
