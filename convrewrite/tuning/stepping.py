"""AdamW with a rate that is relative to the size of each parameter, and the running average of what it does.

The stages of a chain may have any sizes as long as their product is the same, so a step is a part of a parameter's own root mean
square: it changes the product by the same part however the sizes are shared out.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convrewrite.tuning.trainable import numbers_of, put_numbers

AVERAGE = 0.99
"""Decay of the running average of the parameters, about a hundred steps, which is judged and kept: it is less shaken by single
batches than the parameters themselves (Polyak and Juditsky 1992)."""

LEAST_SIZE, LEAST_BIAS = 1e-3, 0.05
"""Root mean squares that kernels and biases count for at least: a bias of zeros has to move, too, and activations are of about
one, which a twentieth of it a few hundred times over spans."""

DECAY = 1e-4
"""Weight decay of AdamW, in units of the rate of each parameter: it keeps factors from growing against each other."""


class Stepper:
    """Steps of named ``parameters``. ``first`` and ``second`` are Adam's moments, ``average`` the running average, by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """At rest where the parameters are; their sizes are those of now."""
        self.parameters = parameters
        self.average = numbers_of(parameters)
        groups = [{"params": [parameter], "size": size_of(parameter)} for parameter in parameters.values()]
        self._fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
        self._optimizer = torch.optim.AdamW(groups, weight_decay=DECAY, fused=self._fused)
        self.taken = 0

    def step(self, rate: float) -> None:
        """One step by the parameters' gradients; ``rate`` is a part of each one's size."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["size"]
        self._optimizer.step()
        self.taken += 1
        share = 1 - min(AVERAGE, self.taken / (self.taken + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters hold their running average."""
        now = numbers_of(self.parameters)
        put_numbers(self.parameters, self.average)
        try:
            yield
        finally:
            put_numbers(self.parameters, now)

    def moments(self, key: str) -> dict[str, Tensor]:
        """Adam's ``exp_avg`` or ``exp_avg_sq``, by the names of parameters; zeros before the first step."""
        state = self._optimizer.state
        return {name: state[p][key] if key in state[p] else torch.zeros_like(p) for name, p in self.parameters.items()}

    def resume(self, taken: int, average: Mapping[str, Tensor], *moments: Mapping[str, Tensor]) -> None:
        """Go on after ``taken`` steps with Adam's two moments; what the parameters hold is put there by the caller."""
        first, second = moments
        self.taken, self.average = taken, {name: value.clone() for name, value in average.items()}
        for name, parameter in self.parameters.items():
            counted = torch.tensor(float(taken), device=parameter.device if self._fused else "cpu")
            # In the parameter's own layout: the fused step goes through memory, whatever the strides.
            laid = [torch.empty_like(parameter).copy_(moment[name]) for moment in (first, second)]
            self._optimizer.state[parameter] = {"step": counted, "exp_avg": laid[0], "exp_avg_sq": laid[1]}


def size_of(parameter: Tensor) -> float:
    """The root mean square of a parameter, or the least that it counts for."""
    least = LEAST_BIAS if parameter.dim() < 2 else LEAST_SIZE
    return max(least, float(parameter.detach().double().square().mean().sqrt())) if parameter.numel() else least
