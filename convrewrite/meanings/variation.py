"""How much the numbers of an output vary.

An error is small or large compared with that, not with the numbers themselves: a model that always gives 300 errs by one part in
a hundred where the original gives 297 to 303, and has learned nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.meanings.kinds import Meaning
from convrewrite.places import in_float64

LEAST = 1e-3
"""Numbers that vary by less than this part of their root mean square count as constant: so little is near what rounding does to
deep networks."""


@dataclass(slots=True)
class Variation:
    """The running sum of the squared deviations of numbers from the mean of their entry, a channel or a column; float64, no
    number is kept. Numbers that are not finite do not count."""

    _settled: float = 0.0
    _squares: float = 0.0
    _sums: Tensor | None = None

    @classmethod
    def per_number(cls, values: Tensor, meaning: Meaning) -> float:
        """That of the numbers of a tensor, over how many there are; 1 where they are all zero, so that errors are absolute."""
        numbers = in_float64(values.detach())
        found = cls()
        found.add(numbers, meaning)
        each = found.energy / max(1, int(numbers.isfinite().sum()))
        return each if 0 < each < math.inf else 1.0

    def add(self, numbers: Tensor, meaning: Meaning) -> None:
        """A batch in float64. Those with another number of entries than the one before have means of their own."""
        rows = meaning.rows(numbers) if numbers.ndim > 1 else numbers.reshape(-1, 1)
        finite = rows.isfinite()
        known = torch.where(finite, rows, 0.0)
        sums = torch.stack([finite.sum(0).to(rows.dtype), known.sum(0), known.square().sum(0)])
        self._squares += float(sums[2].sum())
        if self._sums is not None and self._sums.shape != sums.shape:
            self._settled, self._sums = self._settled + _deviations(self._sums), None
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def constant(self) -> bool:
        """Whether the numbers do not vary."""
        return self._centred < LEAST**2 * self._squares or not self._squares

    @property
    def energy(self) -> float:
        """The sum, as an unbiased estimate has it (n / (n - 1)); the mean of a single number is not known, and is taken for
        zero. Of constant numbers the sum of their squares."""
        return self._squares if self.constant else self._centred

    @property
    def _centred(self) -> float:
        return self._settled + (0.0 if self._sums is None else _deviations(self._sums))


def _deviations(sums: Tensor) -> float:
    """From ``(3, entries)``: the number of numbers, their sum, and that of their squares."""
    count, total, squares = sums
    several = count > 1
    centred = (squares - total.square() / count.clamp_min(1)).clamp_min(0) * count / (count - 1).clamp_min(1)
    return float(torch.where(several, centred, squares).sum())
