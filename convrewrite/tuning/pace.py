"""How far a training is, by its steps or by the clock, and the rate that belongs to that."""

import math
from dataclasses import dataclass

WARM_UP = 0.05
"""Part of a training in which the rate rises in a line: Adam's second moments are known by then."""


@dataclass(frozen=True, slots=True)
class Pace:
    """A training of so many ``steps``, or else of so many ``seconds``, and its highest ``rate``."""

    rate: float
    steps: int | None = None
    seconds: float = math.inf

    def progress(self, step: int, seconds: float) -> float:
        """Part of the training that is done after ``step`` steps in ``seconds``, 0 to 1."""
        done = step / max(1, self.steps) if self.steps is not None else seconds / self.seconds
        return min(1.0, done)

    def rate_at(self, progress: float) -> float:
        """The rate of the next step: a line up, then half a cosine down (Loshchilov and Hutter 2017, SGDR, one cycle)."""
        if progress < WARM_UP:
            return self.rate * (progress + WARM_UP / 10) / (1.1 * WARM_UP)
        return self.rate * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
