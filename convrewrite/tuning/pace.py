"""The progress of a training, by its steps or by the clock, and the rate at that point."""

import math
from dataclasses import dataclass

WARM_UP = 0.05
"""The part of a training in which the rate rises linearly: after it Adam's second moments are known."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The length of a training, in ``steps`` or otherwise in ``seconds``, and its highest ``rate``."""

    rate: float
    steps: int | None = None
    seconds: float = math.inf

    def progress(self, step: int, seconds: float) -> float:
        """The part of the training, 0 to 1, that is done after ``step`` steps in ``seconds``."""
        done = step / max(1, self.steps) if self.steps is not None else seconds / self.seconds
        return min(1.0, done)

    def rate_at(self, progress: float) -> float:
        """The rate of the next step: a line up, then half a cosine down (Loshchilov and Hutter 2017, SGDR, one cycle)."""
        if progress < WARM_UP:
            return self.rate * (progress + WARM_UP / 10) / (1.1 * WARM_UP)
        return self.rate * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
