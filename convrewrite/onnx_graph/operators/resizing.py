"""What changes the resolution of an image: Resize, Upsample, and sampling at places that are computed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker, Numbers, ints, made, moved, since, taken
from convrewrite.onnx_graph.operators.sampling import (
    COORDINATES,
    NEAREST,
    SIMPLE,
    Sampling,
    Stretch,
    cubic_weights,
    linear_places,
    nearest_places,
    outputs_of,
    smoothed,
)

Real = Tensor | Sequence[float]
"""Numbers that need not be whole."""

TORCH_MODES = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear", ("cubic", 4): "bicubic"}
"""Modes and the numbers of axes of the input -> torch's modes. Torch's cubic filter has the coefficient -0.75."""

GRID_MODES = {
    "linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic",
}  # fmt: skip
"""Values of GridSample's mode, of all its versions -> torch's."""


def resize(
    x: Tensor, roi: Real | None = None, scales: Real | None = None, sizes: Numbers | None = None, *, sampling: Sampling
) -> Tensor:  # fmt: skip
    """Axis by axis; either scales or sizes are given, the others missing or empty. The region of interest is for crops alone.

    An image whose size does not change stays as it is, even where the scales are not 1, as in onnxruntime.
    """
    del roi
    axes = range(x.dim()) if sampling.axes is None else [axis % x.dim() for axis in sampling.axes]
    stretches = _stretches([x.shape[axis] for axis in axes], _real(scales), _whole(sizes), sampling)
    by_axis = dict(zip(axes, stretches, strict=True))
    if all(stretch.size == stretch.outputs for stretch in stretches):
        return x
    if _as_torch(x.dim(), by_axis, sampling):
        wanted = [by_axis[axis].outputs if axis in by_axis else x.shape[axis] for axis in range(2, x.dim())]
        return F.interpolate(x, wanted, mode=TORCH_MODES[sampling.mode, x.dim()])
    for axis in sorted(by_axis, reverse=True):  # the last axis is the slowest, so it comes while the image is small
        stretch = by_axis[axis]
        if stretch.size != stretch.outputs or (stretch.scale != 1 and not sampling.antialias):
            x = _resized(x, axis, stretch, sampling)
    return x


def _as_torch(rank: int, stretches: Mapping[int, Stretch], sampling: Sampling) -> bool:
    """Whether torch, which multiplies where onnxruntime divides, finds the same places: with powers of two it does."""
    fits = all(math.frexp(s.scale)[0] == 0.5 and s.outputs == s.size * s.scale for s in stretches.values())
    if not fits or (sampling.mode, rank) not in TORCH_MODES or sampling.antialias or sampling.exclude_outside:
        return False
    still = all(axis > 1 or stretch.scale == 1 for axis, stretch in stretches.items())
    single = any(stretch.outputs == 1 for stretch in stretches.values())
    way = sampling.coordinates
    return still and sampling.cubic == -0.75 and (way == "half_pixel" or (way == "pytorch_half_pixel" and not single))


def upsample(x: Tensor, scales: Real, *, sampling: Sampling) -> Tensor:
    """The older form, which has scales alone."""
    return resize(x, None, scales, sampling=sampling)


def _stretches(lengths: list[int], scales: list[float], sizes: list[int], sampling: Sampling) -> list[Stretch]:
    """One for every axis that is resized."""
    if not sizes:
        return [Stretch(size, outputs_of(size, scale), scale) for size, scale in zip(lengths, scales, strict=True)]
    ratios = [size / length for size, length in zip(sizes, lengths, strict=True)]
    if sampling.policy != "stretch":
        ratio = min(ratios) if sampling.policy == "not_larger" else max(ratios)
        ratios, sizes = [ratio] * len(lengths), [math.floor(ratio * length + 0.5) for length in lengths]
    return [Stretch(*one) for one in zip(lengths, sizes, ratios, strict=True)]


def _resized(x: Tensor, axis: int, stretch: Stretch, sampling: Sampling) -> Tensor:
    if sampling.mode == "nearest":
        return taken(x, axis, nearest_places(stretch, sampling))
    if sampling.antialias and stretch.scale < 1:
        weights = smoothed(stretch, sampling).to(x)
        return (x.movedim(axis, -1) @ weights.t()).movedim(-1, axis)
    if sampling.mode == "linear":
        before, behind, share = linear_places(stretch, sampling)
        return torch.lerp(taken(x, axis, before), taken(x, axis, behind), _along(share.to(x), axis, x.dim()))
    places, shares = cubic_weights(stretch, sampling)
    weighed = taken(x, axis, places[0]) * _along(shares[0].to(x), axis, x.dim())
    for place, share in zip(places[1:], shares[1:], strict=True):
        weighed = torch.addcmul(weighed, taken(x, axis, place), _along(share.to(x), axis, x.dim()))
    return weighed


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    """Values along one axis, to broadcast along the others."""
    return values.reshape(-1, *[1] * (rank - 1 - axis))


def _real(numbers: Real | None) -> list[float]:
    if numbers is None:
        return []
    return [float(value) for value in (numbers.tolist() if isinstance(numbers, Tensor) else numbers)]


def _whole(numbers: Numbers | None) -> list[int]:
    return [] if numbers is None else ints(numbers)


def make_resize(view: NodeView) -> Made | None:
    """None for modes that are not computed here."""
    given = view.attributes
    axes = given.get("axes")
    sampling = Sampling(
        mode=given.get("mode", "nearest"),
        coordinates=given.get("coordinate_transformation_mode", "half_pixel"),
        nearest=given.get("nearest_mode", "round_prefer_floor"),
        cubic=given.get("cubic_coeff_a", -0.75),
        exclude_outside=bool(given.get("exclude_outside", 0)),
        antialias=bool(given.get("antialias", 0)),
        axes=None if axes is None else tuple(axes),
        policy=given.get("keep_aspect_ratio_policy", "stretch"),
    )
    known = sampling.mode in ("nearest", "linear", "cubic") and sampling.coordinates in COORDINATES
    # Which place is the nearest depends there on how each sum was rounded.
    undecided = sampling.mode == "nearest" and sampling.coordinates == "half_pixel_symmetric"
    if not known or undecided or sampling.nearest not in NEAREST:
        return None
    return Computed(resize, view, {"sampling": sampling}, plain=(1, 2, 3))


def make_upsample(view: NodeView) -> Made | None:
    """The older form, in which the first places of both images coincide."""
    mode = view.attributes.get("mode", "nearest")
    if mode not in ("nearest", "linear"):
        return None
    return Computed(upsample, view, {"sampling": Sampling(mode, "asymmetric", SIMPLE)}, plain=(1,))


def grid_sample(x: Tensor, grid: Tensor, *, mode: str, padding_mode: str, align_corners: int) -> Tensor:
    """The values at places that are given between -1 and 1."""
    return F.grid_sample(x, grid, mode, padding_mode, bool(align_corners))


def affine_grid(theta: Tensor, size: Numbers, *, align_corners: int) -> Tensor:
    """Places of an image of this size after an affine map."""
    return F.affine_grid(theta, ints(size), bool(align_corners))


def make_grid_sample(view: NodeView) -> Made | None:
    """None for modes that torch does not have."""
    given: dict[str, Any] = {"mode": GRID_MODES.get(view.attributes.get("mode", "linear"))}
    if given["mode"] is None or (given["mode"] == "bicubic" and view.ranks[0] != 4):
        return None
    given["padding_mode"] = view.attributes.get("padding_mode", "zeros")
    given["align_corners"] = view.attributes.get("align_corners", 0)
    return Computed(grid_sample, view, given)


RESIZING: dict[str, Maker] = {
    "Resize": since(11, make_resize, before=make_upsample),
    "Upsample": moved(9, make_upsample, scales=1),
    "GridSample": make_grid_sample,
    "AffineGrid": made(affine_grid, plain=(1,), align_corners=0),
}
"""Operators that change a resolution -> their makers."""
