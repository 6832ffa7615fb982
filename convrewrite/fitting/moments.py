"""Means and covariances of a convolution's input patches and outputs, gathered batch by batch.

A patch is what one output position sees, ``d = C * kh * kw`` numbers in the order of the canonical kernel's columns, so that
``y = W p + b`` holds for every kind: padding of every mode, stride, dilation, and transposed convolutions, whose patch is cut
from the input with zeros inserted. Products run in float32, sums in float64; positions are sub-sampled when there are many more
than the covariance needs. Products of data on a device run on it, and sums where float64 is available.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from convrewrite.conv import PADDING_MODES, ConvSpec, Size
from convrewrite.fitting.squares import Correlations, Products, summed_squares
from convrewrite.places import PROCESSOR, exact_place, exactly, in_float64

CHUNK = 1 << 23
"""Numbers in one block of gathered patches: 32 MB in float32."""

SPARSE = 0.05
"""Where at most this share of the positions is gathered, they are picked out of the tensors without copying these first."""

CHEAP = 4_000_000_000
"""This many products of numbers of a patch with each other, or with outputs if these are more, are cheap on any machine."""

ENOUGH, ENOUGH_HELD_OUT = 1 << 15, 1 << 13
"""More positions than these, to fit on and held out, show nothing more where patches are small: on two networks with 16 to 64
channels, `separable` fits to three sets of 1,024 images had KLs from 3 % lower to 1 % higher than those to as many as are cheap,
and took 0.7 to 0.8 of the time of moments and solves."""

TOGETHER = 4096
"""Fewest positions of planes in one product, unless there are no more: smaller products, and adding each of them to sums in
float64, waste time."""

DENSE = 512
"""For patches of at least this many numbers, all positions of a plane are summed up by correlations: for smaller ones, a few
products of patches take less time than many products of planes."""


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of one group: ``mean_p (d,)``, ``mean_y (O,)``, centred ``cov_p (d, d)``,
    ``cov_yp (O, d)`` and ``var_y (O,)``, all float64, over ``count`` positions."""

    count: int
    mean_p: Tensor
    mean_y: Tensor
    cov_p: Tensor
    cov_yp: Tensor
    var_y: Tensor
    centred: bool = True

    def to(self, place: torch.device) -> "Moments":
        """The same on ``place``."""
        each = (self.mean_p, self.mean_y, self.cov_p, self.cov_yp, self.var_y)
        mean_p, mean_y, cov_p, cov_yp, var_y = (tensor.to(exact_place(place)) for tensor in each)
        return Moments(self.count, mean_p, mean_y, cov_p, cov_yp, var_y, self.centred)

    def about_zero(self) -> "Moments":
        """The moments without centring: where no bias can compensate for it, an error of the mean counts like any other."""
        return replace(
            self,
            mean_p=torch.zeros_like(self.mean_p),
            mean_y=torch.zeros_like(self.mean_y),
            cov_p=self.cov_p + torch.outer(self.mean_p, self.mean_p),
            cov_yp=self.cov_yp + torch.outer(self.mean_y, self.mean_p),
            var_y=self.var_y + self.mean_y**2,
            centred=False,
        )


def position_limit(d: int, outputs: int, *, held_out: bool = False) -> int:
    """How many positions are gathered at most, for patches of ``d`` numbers: twenty per unknown of a filter, down to ten where
    these would take more than half a gigabyte; more if cheap, up to ``ENOUGH``.

    Held-out positions only measure errors, which a few thousand of them measure to a percent: two per unknown are enough.
    """
    wanted = 2 * d if held_out else min(20 * d, max(10 * d, (1 << 27) // d))
    enough = ENOUGH_HELD_OUT if held_out else ENOUGH
    return max(wanted, min(enough, CHEAP // (d * max(d, outputs))))


@dataclass(frozen=True, slots=True)
class MomentBytes:
    """Bytes that moments of a convolution, and the positions that are kept beside them, take in memory."""

    spec: ConvSpec

    @property
    def squares(self) -> int:
        """The covariances of all groups' patches, ``(g, d, d)`` in float64."""
        return 8 * self.spec.groups * self.spec.patch**2

    @property
    def row(self) -> int:
        """One position: its patch, its wanted output and its skip, float32."""
        return 4 * self.spec.groups * self.spec.patch + self.outputs

    @property
    def outputs(self) -> int:
        """The wanted output and the skip of one position, float32."""
        return 8 * self.spec.out_channels

    def planes(self, sizes: Sequence[Size]) -> int:
        """Padded input planes of these sizes, one example each, float32: patches are cut from them. Not for transposed ones."""
        (top, bottom), (left, right) = self.spec.padding_pairs()
        pixels = sum((height + top + bottom) * (width + left + right) for height, width in sizes)
        return 4 * self.spec.in_channels * pixels


@dataclass(frozen=True, slots=True)
class Windows:
    """Positions in padded planes ``(N, H, W, C)``, whose patches are cut whenever they are asked for: patches overlap, and all of
    them for a 3 x 3 kernel take nine times the memory of the plane."""

    pixels: Tensor
    place: "Places"
    stride: Size
    spec: ConvSpec

    def patches(self) -> Tensor:
        """``(g, P, d)``."""
        return _gather(self.pixels, self.place, self.stride, self.spec)


@dataclass(frozen=True, slots=True)
class Block:
    """Gathered positions of every group: their patches, or where these can be cut from, and wanted outputs and skips
    ``(g, P, O / g)``, float32."""

    source: Tensor | Windows
    outputs: Tensor
    skips: Tensor | None

    @property
    def patches(self) -> Tensor:
        """``(g, P, d)``, float32."""
        return self.source if isinstance(self.source, Tensor) else self.source.patches()

    def to(self, place: torch.device) -> "Block":
        """The same on ``place``."""
        skips = None if self.skips is None else self.skips.to(place)
        stays = isinstance(self.source, Windows) and self.source.pixels.device == place
        return Block(self.source if stays else self.patches.to(place), self.outputs.to(place), skips)


class Accumulator:
    """Adds up the moments of one convolution, every group by itself."""

    def __init__(
        self,
        spec: ConvSpec,
        expected_positions: int,
        seed: int,
        *,
        keep: bool = False,
        cut: bool = False,
        limit: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Of ``expected_positions`` over all batches about ``limit`` are gathered; None stands for :func:`position_limit`.

        With ``keep`` the gathered blocks stay in ``kept``, for other outputs at the same positions; with ``cut`` as planes that
        patches are cut from. ``device``: where batches lie; None stands for the processor.
        """
        self._spec = spec
        self.kept: list[Block] | None = [] if keep else None
        self._cut = cut
        self._d = spec.patch
        most = position_limit(self._d, spec.out_channels // spec.groups) if limit is None else limit
        self._share = min(1.0, most / max(1, expected_positions))
        self._generator = torch.Generator().manual_seed(seed)
        groups, size = spec.groups, (self._d, spec.out_channels // spec.groups)
        self._count = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        place = exact_place(device or torch.device(PROCESSOR))
        zeros = partial(torch.zeros, dtype=torch.float64, device=place)
        self._sum_p, self._sum_y = zeros(groups, size[0]), zeros(groups, size[1])
        self._sum_yp, self._sum_yy = zeros(groups, size[1], size[0]), zeros(groups, size[1])
        correlated = self._share >= 1 and self._d >= DENSE and _steps_one_by_one(spec)
        self._products = [] if correlated else [Products(self._d, place) for _ in range(groups)]
        planes = (spec.kernel_shape[1], spec.kernel_size, spec.dilation, place)
        self._correlations = [Correlations(*planes) for _ in range(groups)] if correlated else []
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor, skip: Tensor | None = None) -> None:
        """One batch: input ``(N, C, H, W)`` and the wanted output ``(N, O, H', W')``; a skip is only kept beside them."""
        if not y.numel():  # no example of the batch got here, and nothing has no mean
            return
        padded, stride = _patch_source(x, self._spec)
        pixels = _channels_last(padded, self._share)
        outputs = _channels_last(y, self._share)
        skips = None if skip is None else _channels_last(skip, self._share)
        if self._correlations:
            self._wait(pixels, outputs.to(pixels.dtype))
            if self.kept is None:
                return
        chosen = self._choose(y.shape[0] * y.shape[2] * y.shape[3]).to(x.device)
        for part in chosen.split(max(1, CHUNK // (self._d * self._spec.groups))):
            place = _places(part, (y.shape[2], y.shape[3]))
            wanted, beside = (
                None if rows is None else self._grouped(rows[place].to(pixels.dtype)) for rows in (outputs, skips)
            )
            assert wanted is not None
            windows = Windows(pixels, place, stride, self._spec)
            block = Block(windows if self._cut else windows.patches(), wanted, beside)
            if self._products:
                self._add(block.patches, wanted)
            if self.kept is not None:
                self.kept.append(block)

    def _grouped(self, rows: Tensor) -> Tensor:
        return rows.unflatten(1, (self._spec.groups, -1)).transpose(0, 1)

    def _choose(self, total: int) -> Tensor:
        if self._share >= 1:
            return torch.arange(total)
        count = max(1, round(total * self._share))
        return torch.randint(total, (count,), generator=self._generator).sort().values

    def _add(self, patches: Tensor, outputs: Tensor) -> None:
        """Patches ``(g, P, d)`` and outputs ``(g, P, O/g)``, shifted by the first means so that float32 products suffice."""
        if self._shift is None:
            self._shift = (patches.mean(1, keepdim=True), outputs.mean(1, keepdim=True))
        p = patches - self._shift[0]
        y = self._add_outputs(outputs)
        self._sum_p += exactly(p.sum(1))
        for group, products in enumerate(self._products):
            self._sum_yp[group] += exactly(y[group].T @ p[group])
            products.add(p[group])

    def _add_outputs(self, outputs: Tensor) -> Tensor:
        """Add outputs ``(g, P, O / g)`` to the count and the sums, and return them shifted."""
        assert self._shift is not None
        y = outputs - self._shift[1]
        self._count += y.shape[1]
        self._sum_y += exactly(y.sum(1))
        self._sum_yy += summed_squares(y)
        return y

    def _wait(self, pixels: Tensor, outputs: Tensor) -> None:
        """Hold planes back until there are enough of one size to sum up."""
        if self._waiting and self._waiting[0][0].shape[1:] != pixels.shape[1:]:
            self._add_waiting()
        self._waiting.append((pixels, outputs))
        if sum(rows.shape[:3].numel() for _, rows in self._waiting) >= TOGETHER:
            self._add_waiting()

    def _add_waiting(self) -> None:
        match self._waiting:
            case []:
                return
            case [(pixels, outputs)]:
                self._add_planes(pixels, outputs)
            case several:
                planes, rows = zip(*several, strict=True)
                self._add_planes(torch.cat(planes), torch.cat(rows))
        self._waiting = []

    def _add_planes(self, pixels: Tensor, outputs: Tensor) -> None:
        """As :meth:`_add`, with every position of padded planes ``(N, H, W, C)`` and of outputs ``(N, H', W', O)``."""
        (height, width), groups = outputs.shape[1:3], self._spec.groups
        rows = self._grouped(outputs.flatten(0, 2))
        if self._shift is None:
            means = pixels.flatten(0, 2).mean(0).unflatten(0, (groups, -1))
            self._shift = (means.repeat_interleave(self._d // means.shape[1], 1)[:, None], rows.mean(1, keepdim=True))
        y = self._add_outputs(rows)
        channels = pixels.shape[-1] // groups
        taps = self._d // channels
        for group, correlations in enumerate(self._correlations):
            planes = pixels[..., group * channels : (group + 1) * channels] - self._shift[0][group, 0, ::taps]
            sums, products = self._sum_p[group].unflatten(0, (-1, taps)), self._sum_yp[group].unflatten(1, (-1, taps))
            for tap, seen in enumerate(correlations.add(planes, (height, width))):
                sums[:, tap] += exactly(seen.sum(0))
                products[:, :, tap] += exactly(y[group].T @ seen)

    @property
    def empty(self) -> bool:
        """Whether no position was added."""
        return self._count == 0 and not self._waiting

    def result(self) -> tuple[Moments, ...]:
        """The moments of every group. The accumulator gives up its sums: each is turned into a covariance in place."""
        self._add_waiting()
        assert self._shift is not None, "no batch was added"
        return tuple(self._group(group) for group in range(self._spec.groups))

    def _group(self, group: int) -> Moments:
        assert self._shift is not None
        n = self._count
        mean_p, mean_y = self._sum_p[group] / n, self._sum_y[group] / n
        cov_p = (self._correlations or self._products)[group].total().div_(n)
        cov_p.sub_(torch.outer(mean_p, mean_p))
        cov_yp = self._sum_yp[group].div_(n).sub_(torch.outer(mean_y, mean_p))
        var_y = (self._sum_yy[group] / n - mean_y**2).clamp_min(0)
        shift_p, shift_y = (in_float64(shift[group, 0]) for shift in self._shift)
        return Moments(n, mean_p + shift_p, mean_y + shift_y, cov_p, cov_yp, var_y)


def _steps_one_by_one(spec: ConvSpec) -> bool:
    """Whether windows of a kernel lie one position apart in the padded input."""
    return not spec.transposed and spec.stride == (1, 1) and spec.kernel_size != (1, 1)


def with_wanted_outputs(
    moments: Sequence[Moments], blocks: Sequence[Block], outputs: Sequence[Tensor]
) -> tuple[Moments, ...]:
    """The same patches with other wanted outputs ``(g, P, O / g)``, one tensor for each block."""
    count = sum(y.shape[1] for y in outputs)
    sums = torch.stack([exactly(y).sum(1, dtype=torch.float64) for y in outputs]).sum(0)  # (g, O / g)
    means = [mean if m.centred else torch.zeros_like(mean) for m, mean in zip(moments, sums / count, strict=True)]
    found = [(torch.zeros_like(m.cov_yp), torch.zeros_like(m.var_y), torch.zeros_like(m.mean_y)) for m in moments]
    for block, wanted in zip(blocks, outputs, strict=True):
        patches = block.patches  # of one block at a time, as they may be cut from planes
        for p, y, mean, (cov_yp, var_y, rest) in zip(patches, wanted, means, found, strict=True):
            centred = y - mean.to(y)
            cov_yp += exactly(centred.T @ p)
            rest += exactly(centred).sum(0, dtype=torch.float64)
            var_y += summed_squares(centred)
    return tuple(
        # Outputs that are centred but for rounding need no centred patches.
        replace(m, mean_y=mean, cov_yp=(cov_yp - torch.outer(rest, m.mean_p)) / count, var_y=var_y / count)
        for m, mean, (cov_yp, var_y, rest) in zip(moments, means, found, strict=True)
    )


Places = tuple[Tensor, Tensor, Tensor]
"""Example, row and column of every position."""


def _places(positions: Tensor, size: Size) -> Places:
    """Flat output positions of a batch of planes of this size."""
    height, width = size
    return positions // (height * width), positions // width % height, positions % width


def _channels_last(x: Tensor, share: float) -> Tensor:
    """``(N, C, H, W)`` -> ``(N, H, W, C)``; copied only where many positions will be gathered from it."""
    moved = x.permute(0, 2, 3, 1)
    return moved.contiguous() if share > SPARSE else moved


def _patch_source(x: Tensor, spec: ConvSpec) -> tuple[Tensor, Size]:
    """The padded tensor that patches are cut from, and the step between them."""
    x = x.float() if x.dtype != torch.float64 else x
    if spec.transposed:
        return _upsampled(x, spec), (1, 1)
    (top, bottom), (left, right) = spec.padding_pairs()
    if not any((top, bottom, left, right)):
        return x, spec.stride
    return F.pad(x, (left, right, top, bottom), mode=PADDING_MODES[spec.padding_mode]), spec.stride


def _upsampled(x: Tensor, spec: ConvSpec) -> Tensor:
    """The input with zeros between and around: over it a transposed convolution is an ordinary one with its kernel reversed."""
    assert not isinstance(spec.padding, str)
    n, c, height, width = x.shape
    spread = x.new_zeros(n, c, (height - 1) * spec.stride[0] + 1, (width - 1) * spec.stride[1] + 1)
    spread[:, :, :: spec.stride[0], :: spec.stride[1]] = x
    around = [d * (k - 1) - p for d, k, p in zip(spec.dilation, spec.kernel_size, spec.padding, strict=True)]
    extra = spec.output_padding
    return F.pad(spread, (around[1], around[1] + extra[1], around[0], around[0] + extra[0]))


def _gather(pixels: Tensor, place: Places, stride: Size, spec: ConvSpec) -> Tensor:
    """Patches ``(groups, P, d)`` at output positions of a padded batch ``(N, H, W, C)``."""
    image, row, column = place[0], place[1] * stride[0], place[2] * stride[1]
    kh, kw = spec.kernel_size
    taps = [(a * spec.dilation[0], b * spec.dilation[1]) for a in range(kh) for b in range(kw)]
    if spec.transposed:
        taps.reverse()
    columns = torch.stack([pixels[image, row + a, column + b] for a, b in taps], dim=-1)  # (P, C, taps)
    return columns.unflatten(1, (spec.groups, -1)).flatten(2).transpose(0, 1)
