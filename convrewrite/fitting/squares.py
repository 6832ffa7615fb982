"""Sums of products of the patches of one group with themselves: the larger part of the cost of moments.

Products run in the precision of the input, as a rule float32. Some positions are summed up in that precision before they are
added to the sums in float64: adding each would cost as much as the products.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import torch
from torch import Tensor

from convrewrite.conv import Size
from convrewrite.places import exactly, in_float64

PART = 1 << 14
"""Positions whose products are summed in the precision of the patches before they are added to the sums in float64."""

STRIP = 512
"""Rows of a covariance that are summed up at a time; what lies left of the diagonal mirrors what lies above it."""


FAINT = 1e-30
"""Sums of squares below this may have lost some of them in float32, whose least number is 1e-38."""


def summed_squares(rows: Tensor) -> Tensor:
    """The sums of the squares of columns, ``(..., P, O)`` -> ``(..., O)`` in float64. In float32 the squares of small numbers are
    zero and those of large ones infinite: columns whose sum may be wrong are squared in float64."""
    found = in_float64(rows.square().sum(-2))
    doubtful = ~((found >= FAINT) & found.isfinite()).reshape(-1, rows.shape[-1]).all(0)
    if rows.dtype != torch.float64 and bool(doubtful.any()):
        found[..., doubtful] = in_float64(rows[..., doubtful.to(rows.device)]).square().sum(-2)
    return found


class _Sums:
    """Sums of this shape, which end up in float64."""

    def __init__(self, shape: Sequence[int], place: torch.device) -> None:
        self.exact = torch.zeros(*shape, dtype=torch.float64, device=place)
        self._part: Tensor | None = None
        self._count = 0

    def part(self, like: Tensor, count: int) -> Tensor:
        """Where products of ``count`` further positions may be added, in the precision of ``like``."""
        if self._count >= PART:
            self._flush()
        if self._part is None:
            self._part = torch.zeros(self.exact.shape, dtype=like.dtype, device=like.device)
        self._count += count
        return self._part

    def total(self) -> Tensor:
        """All sums; nothing may be added any more."""
        self._flush()
        self._part = None
        return self.exact

    def _flush(self) -> None:
        if self._part is not None:
            self.exact += exactly(self._part)
            self._part.zero_()
        self._count = 0


class Products:
    """The sums over arbitrary positions."""

    def __init__(self, size: int, place: torch.device) -> None:
        self._sums = _Sums((size, size), place)

    def add(self, patches: Tensor) -> None:
        """Patches ``(P, d)``."""
        for start, strip in strips(self._sums.part(patches, len(patches))):
            strip.addmm_(patches[:, start : start + STRIP].T, patches[:, start:])

    def total(self) -> Tensor:
        """The sums ``(d, d)``, float64."""
        found = self._sums.total()
        for start, strip in strips(found):
            found[start + STRIP :, start : start + STRIP] = strip[:, STRIP:].T
        return found


class Correlations:
    """The sums over all positions of planes that kernels step through one by one.

    For two numbers of a patch only their lag in the plane matters, whichever taps they belong to, and the windows of neighbouring
    pairs of taps with the same lag share all but a line of their positions. So each lag takes one product over a window, and each
    further pair of taps one over the lines by which its window differs: for a 3 x 3 kernel 13 large products instead of 45.
    """

    def __init__(self, channels: int, kernel_size: Size, dilation: Size, place: torch.device) -> None:
        self._kernel_size, self._dilation = kernel_size, dilation
        self._pairs = tuple(_pairs(kernel_size))
        self._sums = _Sums((len(self._pairs), channels, channels), place)

    def add(self, planes: Tensor, size: Size) -> tuple[Tensor, ...]:
        """Add padded planes ``(N, H, W, C)``, over ``size`` positions of the kernel's corner. Returns what each tap sees there,
        ``(P, C)``."""
        parts = self._sums.part(planes, len(planes) * size[0] * size[1])
        seen = {tap: self._window(planes, tap, (0, 0), size) for tap in _taps(self._kernel_size)}
        for part, pair in zip(parts, self._pairs, strict=True):
            if pair.before is None:
                part.addmm_(seen[pair.first].T, seen[pair.second])
                continue
            new, old = self._lines(pair.first[0] > pair.before[0][0], size)
            left, right = (
                (self._window(planes, tap, *new), self._window(planes, tap, *old)) for tap in (pair.first, pair.second)
            )
            part.addmm_(torch.cat((left[0], -left[1])).T, torch.cat(right))
        return tuple(seen.values())

    def total(self) -> Tensor:
        """The sums ``(d, d)``, float64."""
        sums = self._sums.total()
        channels, taps = sums.shape[1], list(_taps(self._kernel_size))
        which = {(pair.first, pair.second): index for index, pair in enumerate(self._pairs)}
        for own, pair in zip(sums, self._pairs, strict=True):
            if pair.before is not None:
                own += sums[which[pair.before]]
        found = sums.new_empty(channels, len(taps), channels, len(taps))
        for row, first in enumerate(taps):  # blocks that end up next to each other are written together
            blocks = [
                sums[which[first, second]] if first <= second else sums[which[second, first]].T for second in taps
            ]
            found[:, row] = torch.stack(blocks).permute(1, 2, 0)
        return found.reshape(channels * len(taps), -1)

    def _lines(self, down: bool, size: Size) -> tuple[tuple[Size, Size], tuple[Size, Size]]:
        """Corner and extent of the strip that a window gains by moving one step, down or to the right, and of the strip that it
        loses, which lies outside of it."""
        (height, width), (dh, dw) = size, self._dilation
        if down:
            lines = min(dh, height)
            return ((height - lines, 0), (lines, width)), ((-dh, 0), (lines, width))
        lines = min(dw, width)
        return ((0, width - lines), (height, lines)), ((0, -dw), (height, lines))

    def _window(self, planes: Tensor, tap: Size, corner: Size, extent: Size) -> Tensor:
        """What a tap sees at these positions, ``(P, C)``."""
        row, column = (t * d + c for t, d, c in zip(tap, self._dilation, corner, strict=True))
        return planes[:, row : row + extent[0], column : column + extent[1]].flatten(0, 2)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two taps, and the two taps one step ``before`` them with the same lag: a step along the columns if possible, otherwise
    along the rows; None if neither is possible."""

    first: Size
    second: Size
    before: tuple[Size, Size] | None


def _pairs(kernel_size: Size) -> Iterator[_Pair]:
    """Every pair of taps once, after the pair one step before it."""
    for first, second in combinations_with_replacement(_taps(kernel_size), 2):
        (a, b), (c, d) = first, second
        if min(b, d) > 0:
            yield _Pair(first, second, ((a, b - 1), (c, d - 1)))
        elif a > 0:
            yield _Pair(first, second, ((a - 1, b), (c - 1, d)))
        else:
            yield _Pair(first, second, None)


def _taps(kernel_size: Size) -> Iterator[Size]:
    height, width = kernel_size
    return product(range(height), range(width))


def strips(square: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of a symmetric matrix, some at a time, from the diagonal on, each time with the index of the first row."""
    for start in range(0, len(square), STRIP):
        yield start, square[start : start + STRIP, start:]
