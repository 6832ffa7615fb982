"""Steps downhill, relative to the size of what is trained: Adam on one vector of all numbers, and their running average.

The stages of a chain may have any sizes, as long as their product is the same. A step that is a part of a stage's own root mean
square changes the product by the same part whatever they are.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FIRST, SECOND = 0.9, 0.999
"""Decay of the averages of gradients and of their squares, those of Kingma and Ba 2015."""

LEAST = 1e-12
"""What is added to the root of the squares: far below any gradient that counts, as gradients are those of a mean over many."""

WARM = 0.05
"""Part of the steps in which the rate rises from nothing: the averages of squares rest on few gradients there."""


def flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The numbers of all parameters, one behind the other, at least in float32."""
    numbers = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def put(parameters: Sequence[nn.Parameter], numbers: Tensor) -> None:
    """Let the parameters hold what :func:`flat` gave."""
    with torch.no_grad():
        parts = numbers.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view(parameter.shape))


def rate_at(step: int, steps: int) -> float:
    """Part of the highest rate at a step: a linear rise, then half a cosine down to nothing."""
    warm = max(1, int(WARM * steps))
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


@dataclass(slots=True)
class Descent:
    """Adam over ``parameters``; ``scales`` has, for every number, what a step is relative to. ``average`` is the running mean of
    the numbers over about ``1 / (1 - decay)`` steps (Polyak and Juditsky 1992), which is less noisy than they are."""

    parameters: Sequence[nn.Parameter]
    scales: Tensor
    decay: float
    numbers: Tensor
    average: Tensor
    mean: Tensor
    square: Tensor
    taken: int = 0

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], scales: Sequence[float], decay: float) -> "Descent":
        """At rest where the parameters are; one of ``scales`` for each of them."""
        numbers = flat(parameters)
        parts = [numbers.new_full((p.numel(),), scale) for p, scale in zip(parameters, scales, strict=True)]
        zeros = torch.zeros_like(numbers)
        return cls(parameters, torch.cat(parts), decay, numbers, numbers.clone(), zeros, zeros.clone())

    def step(self, rate: float) -> None:
        """One step by the parameters' gradients, which are taken off; ``rate`` is the relative size of a step."""
        gradient = torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(self.numbers.dtype) for p in self.parameters
        ])  # fmt: skip
        self.taken += 1
        self.mean.lerp_(gradient, 1 - FIRST)
        self.square.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
        mean, square = self.mean / (1 - FIRST**self.taken), self.square / (1 - SECOND**self.taken)
        self.numbers -= rate * self.scales * mean / (square.sqrt() + LEAST)
        self.average.lerp_(self.numbers, 1 - min(self.decay, self.taken / (self.taken + 9)))
        put(self.parameters, self.numbers)
        for parameter in self.parameters:
            parameter.grad = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters hold their running average."""
        put(self.parameters, self.average)
        try:
            yield
        finally:
            put(self.parameters, self.numbers)
