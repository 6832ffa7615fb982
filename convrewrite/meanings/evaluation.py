"""What effects, fidelity and parity are measured on in one run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from convrewrite.inputs import Inputs, moved
from convrewrite.meanings.kinds import NOTHING, Meaning, tell


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The inputs that effects, fidelity and parity are measured on in one run, and the sentence that says so; ``noise``: they are
    noise, as there was nothing else. ``meanings`` are those of the outputs."""

    batches: tuple[Inputs, ...]
    basis: str
    noise: bool = False
    meanings: Mapping[str, Meaning] = field(default_factory=dict)

    def on(self, device: torch.device) -> "Evaluation":
        """The same on a device."""
        return replace(self, batches=tuple(moved(batch, device) for batch in self.batches))

    def with_meanings(
        self,
        model: nn.Module,
        asked: Mapping[str, Meaning],
        known: Mapping[str, Meaning] = NOTHING,
        *,
        comparable: bool = False,
    ) -> "Evaluation":
        """With what the outputs of the original mean, found on these inputs once for the whole run; ``comparable`` as in
        :func:`tell`, unless they are noise."""
        real = not self.noise
        meanings = tell(model, self.batches, asked, known=known, representative=real, comparable=comparable and real)
        return replace(self, meanings=meanings)
