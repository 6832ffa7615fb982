"""What the values of one output look like on some inputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.meanings.moves import CONVOLUTION, LINEAR
from convrewrite.meanings.origins import Origin

ROWS = 1 << 15
"""About as many rows as statistics are taken of, evenly spread."""

ENOUGH = 16
"""Fewest examples whose looks are trusted."""

WIDE = 100
"""From so many entries on, a vector without any that stands out holds no class scores: of so many classes a trained network knows
at least some to be wrong."""

LARGE = 5.0
"""Numbers above this are large. Two or three numbers without a negative one speak against scores only if their mean is: where
they are small, that may be chance."""

EVEN = 0.9
"""An entropy of more than this part of the logarithm of the number of classes is that of a guess."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One output: its values ``(rows, K)`` by axis in float64, and what is known of where it came from.

    ``axes``: those along which there may be classes or vectors; ``axis``: the likelier one.
    """

    name: str
    shape: tuple[int, ...]
    floating: bool
    origin: Origin | None
    rows: dict[int, Tensor]
    tolerance: float
    input_sizes: tuple[tuple[int, ...], ...]
    representative: bool

    @classmethod
    def of(
        cls,
        name: str,
        sample: Tensor,
        origin: Origin | None,
        input_sizes: Sequence[tuple[int, ...]],
        representative: bool,
    ) -> "Seen":
        """From a sample ``(N, ...)`` of the output."""
        axes = [1] if sample.ndim == 2 else [1, -1] if sample.ndim > 2 else []
        followed = origin.axis if origin is not None else None
        axes += [followed] if followed and 1 < followed < sample.ndim - 1 else []
        rows = {axis: _rows(sample, axis) for axis in axes} if sample.is_floating_point() and sample.numel() else {}
        half = sample.is_floating_point() and sample.element_size() == 2
        return cls(
            name, tuple(sample.shape), sample.is_floating_point(), origin, rows, 2e-2 if half else 1e-3,
            tuple(input_sizes), representative,
        )  # fmt: skip

    @property
    def ndim(self) -> int:
        """Axes of the output, its batch included."""
        return len(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which there are at least two entries."""
        return tuple(axis for axis in self.rows if self.shape[axis] >= 2)

    @property
    def axis(self) -> int:
        """Where the channels lie, as far as they could be followed; otherwise the last axis where a linear layer gave the output,
        and the first behind the batch for any other function."""
        followed = self.origin.axis if self.origin else None
        if followed and self.ndim > 2:
            return -1 if followed == self.ndim - 1 else followed
        return -1 if self.ndim > 2 and self.function in LINEAR else 1

    @property
    def width(self) -> int:
        """Entries along the axis; along the last of three axes instead if that has four."""
        if self.ndim < 2:
            return 1
        return self.shape[-1] if self.ndim == 3 and self.shape[-1] == 4 else self.shape[self.axis]

    @property
    def function(self) -> str:
        """The function that gave it; empty where that is not known."""
        return self.origin.function if self.origin else ""

    @property
    def enough(self) -> bool:
        """Whether there are enough inputs to judge looks by."""
        return self.representative and self.axis in self.axes and self.shape[0] >= ENOUGH and self._finite

    @property
    def _finite(self) -> bool:
        return all(bool(rows.isfinite().all()) for rows in self.rows.values())

    @property
    def within_unit(self) -> bool:
        """Whether all numbers lie in [0, 1], and not all are the same."""
        if not self.rows:
            return False
        rows = next(iter(self.rows.values()))
        return bool(rows.min() >= 0) and bool(rows.max() <= 1) and bool(rows.max() > rows.min())

    @property
    def saturated(self) -> bool:
        """Whether most of the numbers lie near 0 or 1."""
        if not self.rows:
            return False
        rows = next(iter(self.rows.values()))
        return float((rows - 0.5).abs().median()) > 0.4

    @property
    def like_an_input(self) -> bool:
        """Whether it is a picture of one or three channels, as large as an input."""
        if self.ndim != 4 or self.shape[1] not in (1, 3):
            return False
        return any(size == self.shape[1:] for size in self.input_sizes)

    def sums_to_one(self, axis: int) -> bool:
        """Whether every row is a distribution."""
        rows = self.rows[axis]
        inside = bool(rows.min() >= -self.tolerance) and bool(rows.max() <= 1 + self.tolerance)
        return inside and bool(((rows.sum(1) - 1).abs() <= self.tolerance).all())

    def log_sums_to_zero(self, axis: int) -> bool:
        """Whether every row holds the logarithms of a distribution."""
        return bool((self.rows[axis].logsumexp(1).abs() <= self.tolerance).all())

    def unit_norm(self, axis: int) -> bool:
        """Whether every row has the length one."""
        rows = self.rows[axis]
        return bool(((rows.norm(dim=1) - 1).abs() <= self.tolerance).all()) and bool(rows.max() > rows.min())

    def against_classes(self) -> str | None:
        """What in the looks of ``(N, K)`` numbers speaks against class scores."""
        rows = self.rows[1]
        chances = rows.softmax(1)
        entropy = -(chances * chances.clamp_min(1e-30).log()).sum(1).mean() / math.log(self.width)
        if self.width >= WIDE and self.width % 32 == 0 and float(entropy) > EVEN:
            return f"{self.width} numbers of which none stands out: features rather than class scores"
        if self.width == 4 and _boxes(rows):
            return "four numbers of which the last two are always the larger ones: corners of a box"
        if self.function not in (*LINEAR, *CONVOLUTION, "add"):
            return None
        if bool(rows.min() >= 0) and (self.width > 3 or float(rows.mean()) > LARGE):
            return "a linear layer gave it, and none of its numbers is negative: measures rather than class scores"
        return None

    def shares(self) -> tuple[int, tuple[int, ...]] | None:
        """The entries that stay in [0, 1] where others are large, and their axis: a detector's scores beside its boxes in pixels,
        which are along its channels, or in the rows of a list of boxes."""
        lists = self.ndim == 3 and self.shape[-1] < self.shape[1]
        found = [(axis, _shares(self.rows[axis])) for axis in self.axes if axis == self.axis or lists]
        return next(((axis, shares) for axis, shares in reversed(found) if shares), None)

    def confident_map(self) -> bool:
        """Whether one of several channels is on top at most positions, not always the same, as of class scores."""
        rows = self.rows[self.axis]
        top = rows.softmax(1).max(1).values
        if float(top.mean()) < 0.6 or float(rows.min()) >= 0 or len(rows.argmax(1).unique()) < 2:
            return False
        return self.shape[self.axis] > 3 or _opposed(rows)


def _rows(sample: Tensor, axis: int) -> Tensor:
    rows = sample.detach().movedim(axis, -1).flatten(0, -2)
    return rows[:: max(1, len(rows) // ROWS)].cpu().double()


def _shares(rows: Tensor) -> tuple[int, ...]:
    low, high = rows.amin(0), rows.amax(0)
    inside = (low >= 0) & (high <= 1)
    if not bool((inside & (high > low)).any()) or not float(high.max()) > LARGE:
        return ()
    return tuple(inside.nonzero().flatten().tolist())


def _boxes(rows: Tensor) -> bool:
    """Whether they are corners: left, top, right, bottom, of boxes that differ."""
    ordered = bool((rows[:, 2] > rows[:, 0]).all()) and bool((rows[:, 3] > rows[:, 1]).all())
    spread, size = rows.std(0).mean(), (rows[:, 2:] - rows[:, :2]).mean()
    return ordered and bool(spread > 0.1 * size)


def _opposed(rows: Tensor) -> bool:
    """Whether a few channels rise at each other's cost. Scores that a cross entropy has trained do, as its gradients sum up to
    zero; the channels of an image rise together, and those of a flow independently."""
    spread = rows.std(0)
    if not bool((spread > 0).all()):
        return False
    together = torch.corrcoef(rows.T)
    pairs = together[~torch.eye(len(together), dtype=torch.bool)]
    return float(pairs.mean()) < -0.2
