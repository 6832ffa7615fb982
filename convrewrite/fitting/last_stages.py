"""Last stages for several trusts in the data, with the stages before them left as they are: they show which trust is best.

What a last stage is solved from is linear in the second moments, so these go through the stages before it only once, however many
trusts there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.fitting.found import share_left
from convrewrite.fitting.moments import Moments
from convrewrite.fitting.objective import LastInput
from convrewrite.fitting.targets import Ground, Second
from convrewrite.fitting.trust import Trust
from convrewrite.structures import Stage


@dataclass(frozen=True, slots=True)
class LastStages:
    """What the last stages of one group are solved from: the ``data`` as it is; ``diagonal``, with the covariance drawn wholly to
    its diagonal and what that adds to the response; that of ``white`` inputs whose wanted output is the original kernel's; and
    the ``unseen`` data, on which they are judged."""

    ground: Ground
    held_out: Moments
    data: LastInput
    diagonal: LastInput
    white: LastInput
    unseen: LastInput

    @classmethod
    def of(cls, kernels: Sequence[Tensor], stages: Sequence[Stage], ground: Ground, held_out: Moments) -> "LastStages":
        """With the kernels of all stages but the last, float64."""
        flat, variances = ground.kernel.flatten(1), ground.moments.cov_p.diagonal()
        drawn, white = (variances, flat * variances - ground.known), (torch.ones_like(variances), flat)
        diagonal, identity = LastInput.of_diagonals(kernels, stages, (drawn, white), ground.shape)

        def of(moments: Moments) -> LastInput:
            return LastInput.of(kernels, stages, Second(moments.cov_p, moments.cov_yp, ground.shape))

        return cls(ground, held_out, of(ground.moments), diagonal, identity, of(held_out))

    def shares(self, trust: Trust) -> tuple[float, float]:
        """The shares of the variance of the outputs, on the data and on the unseen, that the last stage of a target with this
        trust leaves unexplained."""
        shrinkage, lam = self.ground.drawn(trust.ridge, trust.shrinkage)
        inner = (1 - shrinkage) * self.data.inner + shrinkage * self.diagonal.inner + lam * self.white.inner
        cross = self.data.cross + shrinkage * self.diagonal.cross + lam * self.white.cross
        last = LastInput(inner, cross).optimum()
        seen = share_left(self.data, last, self.ground.moments)
        return seen, share_left(self.unseen, last, self.held_out)
