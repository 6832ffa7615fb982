"""AdamW with a rate that is relative to the size of each parameter, and the running average of what it does.

The stages of a chain may have any sizes as long as their product is the same, so a step is a part of a parameter's own root mean
square: it changes the product by the same part however the sizes are shared out. Source: Loshchilov and Hutter 2019, "Decoupled
Weight Decay Regularization", algorithm 2; all parameters go through each line together, as there are many small ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convrewrite.places import in_float64
from convrewrite.tuning.trainable import numbers_of, put_numbers

FIRST, SECOND, LEAST = 0.9, 0.999, 1e-12
"""Decays of the averages of gradients and of their squares, the authors' own, and what is added to the root of these: far below
any gradient that counts, as gradients are those of a mean over many."""

AVERAGE = 0.99
"""Decay of the running average of the parameters, about a hundred steps, which is judged and kept: it is less shaken by single
batches than the parameters themselves (Polyak and Juditsky 1992)."""

LEAST_SIZE, LEAST_BIAS = 1e-3, 0.05
"""Root mean squares that kernels and biases count for at least: a bias of zeros has to move, too, and activations are of about
one, which a twentieth of it a few hundred times over spans."""

DECAY = 1e-4
"""Weight decay, in units of the rate of each parameter: it keeps factors from growing against each other."""


class Stepper:
    """Steps of named ``parameters``. ``first`` and ``second`` are Adam's moments, ``average`` is the running average, by name, in
    the layouts of the parameters; ``taken`` counts the steps."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], sizes: Mapping[str, float] | None = None) -> None:
        """At rest where the parameters are. ``sizes``, by name, are what steps are relative to; their own of now, where none are
        given."""
        self.parameters = parameters
        self.taken = 0
        self.average = numbers_of(parameters)
        self.first = {name: torch.zeros_like(value) for name, value in self.average.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.average.items()}
        self._sizes = [size_of(p) if sizes is None else sizes[name] for name, p in parameters.items()]

    def step(self, rate: float) -> None:
        """One step by the parameters' gradients; ``rate`` is a part of each one's size. A parameter without a gradient has none
        to go by, and moves as its earlier ones say."""
        self.taken += 1
        parameters: list[Tensor] = list(self.parameters.values())
        first, second = list(self.first.values()), list(self.second.values())
        rates = [rate * size for size in self._sizes]
        corrected = 1 - FIRST**self.taken
        with torch.no_grad():
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            torch._foreach_lerp_(first, gradients, 1 - FIRST)
            torch._foreach_mul_(second, SECOND)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - SECOND)
            roots = torch._foreach_sqrt(second)
            torch._foreach_div_(roots, (1 - SECOND**self.taken) ** 0.5)
            torch._foreach_add_(roots, LEAST)
            torch._foreach_mul_(parameters, [1 - each * DECAY for each in rates])
            torch._foreach_addcdiv_(parameters, first, roots, [-each / corrected for each in rates])
            share = 1 - min(AVERAGE, self.taken / (self.taken + 9))
            torch._foreach_lerp_(list(self.average.values()), parameters, share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters hold their running average."""
        now = numbers_of(self.parameters)
        put_numbers(self.parameters, self.average)
        try:
            yield
        finally:
            put_numbers(self.parameters, now)

    def resume(self, taken: int, average: Mapping[str, Tensor], *moments: Mapping[str, Tensor]) -> None:
        """Go on after ``taken`` steps with Adam's two moments; what the parameters hold is put there by the caller."""
        self.taken = taken
        for own, given in zip((self.average, self.first, self.second), (average, *moments), strict=True):
            for name, values in own.items():
                values.copy_(given[name])


def size_of(parameter: Tensor) -> float:
    """The root mean square of a parameter, or the least that it counts for."""
    least = LEAST_BIAS if parameter.dim() < 2 else LEAST_SIZE
    return max(least, float(in_float64(parameter.detach()).square().mean().sqrt())) if parameter.numel() else least
