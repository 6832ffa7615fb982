"""From which places of an axis an axis of another size takes its numbers, as the standard's Resize says."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIMPLE = "simple"
"""The mode in which older files take the nearest place: the one before or, when the axis gets shorter, the one behind."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How Resize finds and weighs places; the names of its values are those of the standard's attributes."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    axes: tuple[int, ...] | None = None
    policy: str = "stretch"


@dataclass(frozen=True, slots=True)
class Stretch:
    """One axis: its size, its new size, and their ratio as it was given."""

    size: int
    outputs: int
    scale: float


def half_pixel(stretch: Stretch, i: Tensor) -> Tensor:
    """Places are the middles of what they cover."""
    return (i + 0.5) / _single(stretch.scale) - 0.5


def pytorch_half_pixel(stretch: Stretch, i: Tensor) -> Tensor:
    """As half_pixel, but a single output is the first place."""
    return half_pixel(stretch, i) if stretch.outputs > 1 else torch.zeros_like(i)


def align_corners(stretch: Stretch, i: Tensor) -> Tensor:
    """The first places of both axes coincide, and so do the last ones."""
    return i * (stretch.size - 1) / (stretch.outputs - 1) if stretch.outputs > 1 else torch.zeros_like(i)


def asymmetric(stretch: Stretch, i: Tensor) -> Tensor:
    """The first places of both axes coincide."""
    return i / _single(stretch.scale)


def half_pixel_for_nearest(stretch: Stretch, i: Tensor) -> Tensor:
    """As half_pixel, without the step back."""
    return (i + 0.5) / _single(stretch.scale)


def half_pixel_symmetric(stretch: Stretch, i: Tensor) -> Tensor:
    """As half_pixel, but the middle of the axis stays the middle where the scale was rounded."""
    adjustment = stretch.outputs / (_single(stretch.scale) * stretch.size)
    return stretch.size / 2 * (1 - adjustment) + (i + 0.5) / _single(stretch.scale) - 0.5


COORDINATES: dict[str, Callable[[Stretch, Tensor], Tensor]] = {
    "half_pixel": half_pixel,
    "pytorch_half_pixel": pytorch_half_pixel,
    "align_corners": align_corners,
    "asymmetric": asymmetric,
    "tf_half_pixel_for_nn": half_pixel_for_nearest,
    "half_pixel_symmetric": half_pixel_symmetric,
}
"""Values of coordinate_transformation_mode -> where in the old axis the places of the new one lie. Crops are not here: in
onnxruntime they depend on which of its kernels runs."""


def _single(scale: float) -> Tensor:
    """A scale in single precision, in which onnxruntime divides by it."""
    return torch.tensor(scale, dtype=torch.float32)


def places_of(stretch: Stretch, sampling: Sampling) -> Tensor:
    """Where in the old axis the places of the new one lie, in single precision as onnxruntime computes them."""
    return COORDINATES[sampling.coordinates](stretch, torch.arange(stretch.outputs, dtype=torch.float32))


def _one_before(places: Tensor, _shrinks: bool) -> Tensor:
    return places.floor()


def _one_behind(places: Tensor, _shrinks: bool) -> Tensor:
    return places.ceil()


def _closest_or_before(places: Tensor, _shrinks: bool) -> Tensor:
    return (places - 0.5).ceil()


def _closest_or_behind(places: Tensor, _shrinks: bool) -> Tensor:
    return (places + 0.5).floor()


def _simple(places: Tensor, shrinks: bool) -> Tensor:
    return places.ceil() if shrinks else places.floor()


NEAREST: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "floor": _one_before,
    "ceil": _one_behind,
    "round_prefer_floor": _closest_or_before,
    "round_prefer_ceil": _closest_or_behind,
    SIMPLE: _simple,
}
"""Values of nearest_mode -> which whole place is taken, also given whether the axis gets shorter."""


def nearest_places(stretch: Stretch, sampling: Sampling) -> Tensor:
    """For every new place the old one."""
    places = NEAREST[sampling.nearest](places_of(stretch, sampling), stretch.scale < 1)
    return places.clamp(0, stretch.size - 1).long()


def linear_places(stretch: Stretch, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """For every new place the old ones before and behind it, and the weight of the second."""
    places = places_of(stretch, sampling).clamp(0, stretch.size - 1)
    before = places.floor()
    behind = (before + 1).clamp(max=stretch.size - 1)
    share = places - before
    return before.long(), behind.long(), share


def cubic_weights(stretch: Stretch, sampling: Sampling) -> tuple[list[Tensor], list[Tensor]]:
    """For every new place four old ones, and their weights; beyond the ends the last one is repeated, or excluded."""
    places = places_of(stretch, sampling)
    around = [places.floor() + offset for offset in (-1, 0, 1, 2)]
    weights = [cubic_filter((places - place).abs(), sampling.cubic) for place in around]
    if sampling.exclude_outside:
        weights = [w * ((p >= 0) & (p < stretch.size)) for p, w in zip(around, weights, strict=True)]
        total = torch.stack(weights).sum(0)
        weights = [weight / total for weight in weights]
    return [place.clamp(0, stretch.size - 1).long() for place in around], weights


def cubic_filter(distance: Tensor, a: float) -> Tensor:
    """The weight of a place at this distance, in places."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


def linear_filter(distance: Tensor) -> Tensor:
    """The weight of a place at this distance, in places."""
    return (1 - distance).clamp(min=0)


def smoothed(stretch: Stretch, sampling: Sampling) -> Tensor:
    """The weights of all old places for every new one, the filter being as wide as what a new place covers.

    What falls beyond the ends is excluded, or counts for the last place.
    """
    beyond = math.ceil(2 / stretch.scale) + 1  # the wider filter reaches two new places far
    around = torch.arange(-beyond, stretch.size + beyond, dtype=torch.float32)
    distance = (around - places_of(stretch, sampling).unsqueeze(1)).abs() * stretch.scale
    weights = linear_filter(distance) if sampling.mode == "linear" else cubic_filter(distance, sampling.cubic)
    inner = weights[:, beyond:-beyond].clone()
    if not sampling.exclude_outside:
        inner[:, 0] += weights[:, :beyond].sum(1)
        inner[:, -1] += weights[:, -beyond:].sum(1)
    return inner / inner.sum(1, keepdim=True)


def outputs_of(size: int, scale: float) -> int:
    """The new size of an axis, computed in single precision as onnxruntime does."""
    return math.floor(float(torch.tensor(scale, dtype=torch.float32) * size))
