"""How much the numbers of an output vary, and how much of that another output does not explain.

An error is small or large compared with that, not with the numbers themselves: a model that always gives 300 errs by one part in
a hundred where the original gives 297 to 303, and has learned nothing. Numbers of several units are compared unit by unit, as the
R squared of a regression with several targets is the mean of theirs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.meanings.kinds import Meaning
from convrewrite.places import in_float64

LEAST = 1e-3
"""Numbers that vary by less than this part of their root mean square count as constant: so little is near what rounding does to
deep networks."""

NOTHING_BESIDE = 1e-6
"""Numbers of one unit that vary by less than this part of what all do count as constant, too: scores that vary by 0.02 beside
boxes of thousands of pixels do not."""


@dataclass(slots=True)
class Variation:
    """Running sums over the numbers of one output, entry by entry along its axis, in float64; no number is kept. Numbers that are
    not finite do not count. An output whose number of entries changes from batch to batch has one entry."""

    meaning: Meaning
    _sums: Tensor | None = None

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """A batch of an output in float64, and of another's."""
        sums = torch.stack([self._by_entry(part) for part in _terms(wanted, found)])
        if self._sums is not None and self._sums.shape != sums.shape:
            self._sums, sums = self._sums.sum(1, keepdim=True), sums.sum(1, keepdim=True)
        self._sums = sums if self._sums is None else self._sums + sums

    def see(self, output: Tensor) -> None:
        """A batch of an output that is compared with no other."""
        numbers = in_float64(output.detach())
        self.add(numbers, numbers)

    def parts(self) -> list[tuple[float, float]]:
        """The sums of the squared differences and of the squared numbers of every part (``Meaning.parts``)."""
        _, _, squares, differences = self._of_entries
        inside = self.meaning.inside(len(squares)).to(squares.device)
        chosen = (~inside, inside) if bool(inside.any()) else (~inside,)
        return [(float(differences[part].sum()), float(squares[part].sum())) for part in chosen]

    @property
    def constant(self) -> bool:
        """Whether the numbers do not vary."""
        _, _, squares, _ = self._of_entries
        return not bool(self._deviations.sum() >= LEAST**2 * squares.sum()) or not bool(squares.sum())

    @property
    def unexplained(self) -> float:
        """The part of the variance that is not explained, the mean over the units; of constant numbers, the squared error over
        their squares."""
        _, _, squares, differences = self._of_entries
        if not bool(squares.sum()):
            return math.inf if bool(differences.sum()) else 0.0
        return float((differences / self._wholes).sum())

    def scales(self) -> Tensor:
        """``(entries,)``: what a squared difference counts in relation to, so that the mean over all numbers is
        :attr:`unexplained`; a single number where that is the same for all. 1 where all numbers are zero."""
        count, _, squares, _ = self._of_entries
        if not bool(squares.sum() > 0) or not bool(squares.sum().isfinite()):
            return torch.ones(1)
        scales = self._wholes / count.sum()
        return scales[:1] if bool((scales == scales[0]).all()) else scales

    @property
    def _of_entries(self) -> Tensor:
        assert self._sums is not None
        return self._sums

    @property
    def _deviations(self) -> Tensor:
        """``(entries,)``: squared deviations from the mean, as an unbiased estimate has them; the mean of a single number is not
        known, and is taken for zero."""
        count, total, squares, _ = self._of_entries
        several = count > 1
        centred = (squares - total.square() / count.clamp_min(1)).clamp_min(0) * count / (count - 1).clamp_min(1)
        return torch.where(several, centred, squares)

    @property
    def _wholes(self) -> Tensor:
        """``(entries,)``: what the squared error of each entry is a part of: the sum of the squared deviations of its unit, times
        the number of units. A unit whose numbers are constant is compared with the average of all."""
        count, _, squares, _ = self._of_entries
        units = self.meaning.units(len(count)).to(count.device)
        energy = squares if self.constant else self._deviations
        counts, energies = _summed(count, units).clamp_min(1), _summed(energy, units)
        average = energy.sum() / count.sum().clamp_min(1)
        each = energies / counts
        still = (energies < LEAST**2 * _summed(squares, units)) | (each <= NOTHING_BESIDE**2 * average)
        return (torch.where(still, average, each) * counts * len(counts))[units]

    def _by_entry(self, numbers: Tensor) -> Tensor:
        """``(entries,)``: the sums over all but the axis of the entries."""
        if numbers.ndim < 2 or (self._sums is not None and self._sums.shape[1] == 1):
            return numbers.sum().reshape(1)
        axis = self.meaning.axis % numbers.ndim
        return numbers.sum([other for other in range(numbers.ndim) if other != axis])


def along_axis(scales: Tensor, output: Tensor, meaning: Meaning) -> Tensor:
    """The scales in a shape that goes with the output; their mean, where it has another number of entries."""
    scales = scales.to(output)
    if len(scales) == 1:
        return scales
    if output.ndim < 2 or output.shape[meaning.axis] != len(scales):
        return scales.mean()
    shape = [1] * output.ndim
    shape[meaning.axis] = -1
    return scales.reshape(shape)


def _terms(wanted: Tensor, found: Tensor) -> Iterator[Tensor]:
    """What is summed: whether numbers count, the numbers, their squares and those of the differences; one at a time, as outputs
    may be large."""
    finite = wanted.isfinite()
    if finite.all():
        yield wanted.new_ones(()).expand(wanted.shape)
        yield wanted
        yield wanted.square()
        yield (wanted - found).square()
        return
    yield finite.to(wanted.dtype)
    known = torch.where(finite, wanted, 0.0)
    yield known
    yield known.square()
    yield torch.where(wanted == found, 0.0, wanted - found).square()


def _summed(numbers: Tensor, units: Tensor) -> Tensor:
    return numbers.new_zeros(int(units.max()) + 1 if len(units) else 1).index_add(0, units, numbers)
