"""Steps with a rate that is relative to the size of each parameter, and the running average of the parameters.

The stages of a chain may have any sizes as long as their product is the same, so a step is a part of a parameter's own root mean
square: it changes the product by the same part however the size is divided among the stages. Every line works on all parameters
at once, as there are many small ones.

Steps are those of AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2); or, for kernels that
are matrices from a stage's inputs to its outputs, the momentum made orthogonal. All directions of a kernel then move alike,
whereas Adam's steps follow the few large ones; in a stage of low rank all are needed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convrewrite.places import in_float64
from convrewrite.tuning.orthogonal import is_matrix, orthogonal
from convrewrite.tuning.trainable import at_least_single, numbers_of, put_numbers

FIRST, SECOND, LEAST = 0.9, 0.999, 1e-12
"""Decays of the averages of gradients and of their squares, the authors' own, and what is added to the root of the latter: far
below any gradient that counts, as gradients are those of a mean over many numbers."""

MOMENTUM = 0.95
"""Decay of the average of gradients where steps are orthogonal: the value of the method's author."""

AVERAGE = 0.99
"""Decay of the running average of the parameters, about a hundred steps, which is judged and kept: it is less shaken by single
batches than the parameters themselves (Polyak and Juditsky 1992)."""

LEAST_SIZE, LEAST_BIAS = 1e-3, 0.05
"""Lower bounds of the root mean squares that steps are parts of, for kernels and for biases, so that a bias of zeros moves too.
Activations are of about one, a size that a bias then reaches in a few hundred steps."""

DECAY = 1e-4
"""Weight decay, in units of the rate of each parameter: it keeps one factor from growing while another shrinks."""


class Stepper:
    """Steps of named ``parameters``. ``exact`` are their numbers; in half precision, where most steps would be lost in rounding,
    they are those in single precision that the parameters are rounded from (Micikevicius et al. 2018). ``first`` and ``second``
    are Adam's moments, ``average`` is the running average, by name, in the layouts of the parameters; ``taken`` counts the
    steps."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sizes: Mapping[str, float] | None = None,
        orthogonal: bool = False,
    ) -> None:
        """Starts where the parameters are, with moments of zero. ``sizes``, by name, are what steps are relative to; the
        parameters' present sizes if None. ``orthogonal``: whether steps of matrices are made orthogonal."""
        self.parameters = parameters
        self.taken = 0
        self.exact = {name: p.detach().to(at_least_single(p)) for name, p in parameters.items()}
        self.average = {name: value.clone() for name, value in self.exact.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.average.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.average.items()}
        self._sizes = {name: size_of(p) if sizes is None else sizes[name] for name, p in parameters.items()}
        self._matrices = [name for name, p in parameters.items() if orthogonal and is_matrix(p)]
        self._others = [name for name in parameters if name not in set(self._matrices)]
        self._decay = MOMENTUM if orthogonal else FIRST

    def step(self, rate: float, factor: float = 1.0) -> None:
        """One step by the parameters' gradients, which are those of ``factor`` times the loss; ``rate`` is a part of each
        parameter's size. A parameter without a gradient counts as one with a gradient of zero, and still moves by its earlier
        ones."""
        self.taken += 1
        gradients = {
            name: p.grad.to(at_least_single(p)) if p.grad is not None else torch.zeros_like(self.exact[name])
            for name, p in self.parameters.items()
        }
        with torch.no_grad():
            if factor != 1.0:
                torch._foreach_div_(list(gradients.values()), factor)
            torch._foreach_lerp_(list(self.first.values()), list(gradients.values()), 1 - self._decay)
            if self._others:
                self._step_others(rate, gradients)
            if self._matrices:
                self._step_matrices(rate, gradients)
            share = 1 - min(AVERAGE, self.taken / (self.taken + 9))
            torch._foreach_lerp_(list(self.average.values()), list(self.exact.values()), share)
            self._round()

    def _step_others(self, rate: float, gradients: Mapping[str, Tensor]) -> None:
        """The steps of AdamW."""
        parameters, first, second, own = (
            [values[name] for name in self._others] for values in (self.exact, self.first, self.second, gradients)
        )
        rates = [rate * self._sizes[name] for name in self._others]
        corrected = 1 - self._decay**self.taken
        torch._foreach_mul_(second, SECOND)
        torch._foreach_addcmul_(second, own, own, 1 - SECOND)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, (1 - SECOND**self.taken) ** 0.5)
        torch._foreach_add_(roots, LEAST)
        torch._foreach_mul_(parameters, [1 - each * DECAY for each in rates])
        torch._foreach_addcdiv_(parameters, first, roots, [-each / corrected for each in rates])

    def _step_matrices(self, rate: float, gradients: Mapping[str, Tensor]) -> None:
        """Steps along the momentum with the newest gradient added once more (Nesterov), made orthogonal."""
        parameters, first, own = (
            [values[name] for name in self._matrices] for values in (self.exact, self.first, gradients)
        )
        rates = [rate * self._sizes[name] for name in self._matrices]
        steps = orthogonal(torch._foreach_lerp(own, first, self._decay))
        torch._foreach_mul_(steps, rates)
        torch._foreach_mul_(parameters, [1 - each * DECAY for each in rates])
        torch._foreach_sub_(parameters, steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters hold their running average."""
        now = numbers_of(self.parameters)
        put_numbers(self.parameters, self.average)
        try:
            yield
        finally:
            put_numbers(self.parameters, now)

    def resume(self, taken: int, *numbers: Mapping[str, Tensor]) -> None:
        """Go on after ``taken`` steps with the exact numbers, their average and Adam's two moments of then."""
        self.taken = taken
        for own, given in zip((self.exact, self.average, self.first, self.second), numbers, strict=True):
            for name, values in own.items():
                values.copy_(given[name])
        self._round()

    def _round(self) -> None:
        """Let parameters in half precision hold what their exact numbers are rounded to; others are these numbers."""
        put_numbers({name: p for name, p in self.parameters.items() if p.dtype != self.exact[name].dtype}, self.exact)


def size_of(parameter: Tensor) -> float:
    """The root mean square of a parameter, or the lower bound for it."""
    least = LEAST_BIAS if parameter.dim() < 2 else LEAST_SIZE
    return max(least, float(in_float64(parameter.detach()).square().mean().sqrt())) if parameter.numel() else least
