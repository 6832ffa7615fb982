"""Images made from a model's own BatchNorm statistics, for when there are none to calibrate on.

A trained BatchNorm remembers the mean and the variance of what reached it. Seeded noise with the spectrum of natural
images is changed by Adam until a batch of it shows every BatchNorm these same statistics (DeepInversion, Yin et al.
2020, with its total variation prior but without labels). The moments of such images stand in for those of real ones;
those of white noise do not.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.calibration.batches import FEW_INPUTS, Calibration, batch_size, split_inputs
from convrewrite.conv import ConvSpec
from convrewrite.errors import TraceError
from convrewrite.inputs import Inputs
from convrewrite.modules import copy_model, hooked, run
from convrewrite.places import out_of_memory
from convrewrite.state import parameters_of

OnStep = Callable[[int, int, float], None]
"""Function that is called after every step as ``(steps done, steps in all, mismatch)``."""


# Ranges in which networks commonly take their pixels: plain, symmetric, ImageNet-normalised, bytes.
_PIXEL_RANGES = ((0.0, 1.0), (-1.0, 1.0), (-2.1, 2.6), (0.0, 255.0))


# Contrast of the noise at the start, as a part of the range: about that of photographs.
_CONTRAST = 0.25

# Steps of Adam, and how few they, and the images of a batch or in all, may become where a model is so large that more would take
# too long.
_STEPS, _FEWEST_STEPS, _FEWEST_INPUTS = 150, 40, 8

# As a part of the range, at the first step; it falls to zero along a cosine.
_LEARNING_RATE = 0.2

# Weight of the differences between neighbouring pixels against the mismatch of BatchNorm statistics.
_TOTAL_VARIATION = 0.01

# Most numbers of one batch that reach BatchNorms: with all else that the backward pass keeps, about 1 GB in float32.
_ACTIVATIONS = 2**26


@dataclass(slots=True)
class _Statistics:
    """What the BatchNorms of a model were given in its last run: (mean, variance) of every call, for each channel."""

    norms: dict[str, nn.BatchNorm2d]
    moments: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    elements: int = 0
    macs: int = 0


@dataclass(frozen=True, slots=True)
class _Schedule:
    """The sizes of the batches, and how many steps each takes."""

    sizes: tuple[int, ...]
    steps: int


@dataclass(frozen=True, slots=True)
class _Matched:
    """One batch of images, and how far its BatchNorm means are off, in standard deviations, before and after."""

    images: Tensor
    before: float
    after: float


def synthesise(
    model: nn.Module,
    example: Inputs,
    *,
    count: int = 128,
    batch: int = 64,
    steps: int | None = None,
    seed: int = 0,
    work: float = 4e12,
    on_step: OnStep | None = None,
) -> Calibration | None:
    """``count`` images of the shape ``example[0].shape[1:]`` whose batches match the model's BatchNorm statistics.

    ``work`` is the MACs to spend in all: for large models fewer images and steps are made (never fewer than 8 and 40).
    None when the model takes anything but one floating-point image, has no BatchNorm2d with trained running statistics,
    lets no gradient through to the image, or is in half precision and does not run in float32, as one that casts inside its
    forward. The model is left as it is; the same seed gives the same images.
    Raises TraceError when the model does not run on ``example``.
    """
    if len(example) != 1 or example[0].dim() != 4 or not example[0].is_floating_point():
        return None
    frozen = _frozen_copy(model)
    image = example[0][:1].to(_working_dtype(example[0].dtype))
    with _statistics_seen(frozen) as seen, torch.inference_mode(False), torch.enable_grad():
        if not _runs(frozen, image, model, example) or not seen.moments:
            return None
        schedule = _schedule(seen, count, batch, steps or _STEPS, work)
        if not _lets_gradients_through(frozen, seen, image):
            return None
        matched = _match_all(frozen, seen, image, schedule, seed, on_step)
    images = torch.cat([one.images for one in matched]).to(example[0].dtype)
    if not bool(images.isfinite().all()):
        return None
    fit, held_out = split_inputs((images,), batch=batch_size((images,)), seed=seed)
    return Calibration(fit, held_out, "synthetic", "BatchNorm statistics", _notes(matched, schedule))


def _notes(matched: list[_Matched], schedule: _Schedule) -> tuple[str, ...]:
    before, after = (sum(values) / len(matched) for values in zip(*((m.before, m.after) for m in matched), strict=True))
    count = sum(schedule.sizes)
    made = (
        f"{count} images in batches of {schedule.sizes[0]}, {schedule.steps} steps: BatchNorm means are off by "
        f"{after:.2f} standard deviations ({before:.2f} for the noise at the start); real images are better"
    )
    few = f"only {count} images, because the model is large: fits may be better on these than on others"
    return (made, few) if count < FEW_INPUTS else (made,)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 and float64 stay; half precision is too coarse to follow small gradients."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy to run backwards through, so that the original's flags, gradients and buffers stay as they are."""
    # Tensors made in inference mode could not be run backwards through.
    with torch.inference_mode(False):
        frozen = copy_model(model).requires_grad_(False)
        narrow = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in parameters_of(frozen))
        return frozen.float() if narrow else frozen


def _runs(frozen: nn.Module, image: Tensor, model: nn.Module, example: Inputs) -> bool:
    """Whether the copy runs on the image; raises TraceError where the model itself does not run on its example."""
    try:
        run(frozen, (image,))
    except TraceError:
        run(copy_model(model), example)
        return False
    return True


@contextmanager
def _statistics_seen(model: nn.Module) -> Iterator[_Statistics]:
    seen = _Statistics({name: module for name, module in model.named_modules() if _has_statistics(module)})
    norms = (
        module.register_forward_pre_hook(partial(_record_moments, seen, name), with_kwargs=True)
        for name, module in seen.norms.items()
    )
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d))
    counted = (
        module.register_forward_pre_hook(partial(_count_macs, seen), with_kwargs=True) for module in convolutions
    )
    with hooked(chain(norms, counted)):
        yield seen


def _has_statistics(module: nn.Module) -> bool:
    """Whether this is a BatchNorm2d that has seen data: mean 0 and variance 1 throughout are those of a new one."""
    if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.running_var is None:
        return False
    return bool((module.running_mean != 0).any() or (module.running_var != 1).any())


def _record_moments(
    seen: _Statistics, name: str, _norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> None:
    x = _input(args, kwargs)
    variance, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
    seen.moments.setdefault(name, []).append((mean, variance))
    seen.elements += x.numel()


def _count_macs(
    seen: _Statistics, conv: nn.Conv2d | nn.ConvTranspose2d, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = _input(args, kwargs)
    if not isinstance(x, Tensor) or x.dim() < 3:  # a subclass of a convolution takes what it likes
        return
    height, width = x.shape[-2:]
    seen.macs += len(x) * ConvSpec.of(conv).macs((height, width))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer is given first, which a forward may hand to it by its name."""
    return next(iter((*args, *kwargs.values())), None)


def _schedule(seen: _Statistics, count: int, batch: int, steps: int, work: float) -> _Schedule:
    """Within ``work``: first fewer images, as they add little beyond 64, then fewer steps, then fewer images still.

    For each image a step costs its MACs twice: forwards, and backwards to the input.
    """
    image_steps = int(work / (2 * max(seen.macs, 1)))
    count = min(count, max(image_steps // steps, FEW_INPUTS))
    steps = min(steps, max(image_steps // count, _FEWEST_STEPS))
    count = min(count, max(image_steps // steps, _FEWEST_INPUTS))
    batch = min(batch, max(_ACTIVATIONS // seen.elements, _FEWEST_INPUTS))
    batches = math.ceil(count / batch)
    return _Schedule(tuple(count // batches + (i < count % batches) for i in range(batches)), steps)


def _observe(model: nn.Module, seen: _Statistics, images: Tensor) -> tuple[Tensor, Tensor]:
    """How far the BatchNorm inputs for ``images`` are from the running statistics: of means, of variances.

    Squared differences of means in running variances, and of log variances, averaged over channels and BatchNorms.
    A BatchNorm called several times remembers the average of its calls.
    """
    seen.moments.clear()
    model(images)
    means, variances = [], []
    for name, calls in seen.moments.items():
        norm = seen.norms[name]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = (torch.stack(values).mean(0) for values in zip(*calls, strict=True))
        scale = norm.running_var + norm.eps
        means.append(((mean - norm.running_mean).square() / scale).mean())
        variances.append(((variance + norm.eps) / scale).log().square().mean())
    return torch.stack(means).mean(), torch.stack(variances).mean()


def _lets_gradients_through(model: nn.Module, seen: _Statistics, image: Tensor) -> bool:
    pixels = image.clone().requires_grad_()
    try:
        means, variances = _observe(model, seen, pixels + 0)
        if not means.requires_grad:
            return False
        torch.autograd.grad(means + variances, [pixels])
    except Exception as error:  # an operator without a derivative, or a forward that refuses gradients in any way
        if out_of_memory(error):
            raise
        return False
    return True


def _match_all(
    model: nn.Module, seen: _Statistics, image: Tensor, schedule: _Schedule, seed: int, on_step: OnStep | None
) -> list[_Matched]:
    generator = torch.Generator().manual_seed(seed)
    total = schedule.steps * len(schedule.sizes)
    matched = []
    for index, size in enumerate(schedule.sizes):
        report = partial(_report, on_step, index * schedule.steps, total)
        matched.append(_match(model, seen, _natural_noise(image, size, generator), schedule.steps, report))
    return matched


def _report(on_step: OnStep | None, before: int, total: int, step: int, mismatch: float) -> None:
    if on_step is not None:
        on_step(before + step, total, mismatch)


def _natural_noise(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Noise of mean 0 and variance 1 whose amplitudes fall as 1/frequency, as those of photographs do."""
    channels, height, width = image.shape[1:]
    white = torch.randn(size, channels, height, width, generator=generator)
    frequency = torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()
    amplitude = frequency.sqrt().clamp_min(1 / max(height, width)).reciprocal()
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(height, width))
    standard: Tensor = (noise - noise.mean()) / noise.std()
    return standard.to(image)


def _match(
    model: nn.Module, seen: _Statistics, noise: Tensor, steps: int, report: Callable[[int, float], None]
) -> _Matched:
    """Adam on the pixels, which are held in parts of their range so that one learning rate suits all ranges."""
    low, span, before = _pixel_range(model, seen, noise)
    pixels = (0.5 + _CONTRAST * noise).requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=_LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(1, steps + 1):
        means, variances = _observe(model, seen, low + span * pixels)
        loss = means + variances + _TOTAL_VARIATION * _total_variation(pixels) + _out_of_range(pixels)
        (pixels.grad,) = torch.autograd.grad(loss, [pixels])
        optimiser.step()
        schedule.step()
        report(step, float((means + variances).detach()))
    images = (low + span * pixels).detach()
    with torch.no_grad():
        after, _ = _observe(model, seen, images)
    return _Matched(images, before, math.sqrt(float(after)))


def _pixel_range(model: nn.Module, seen: _Statistics, noise: Tensor) -> tuple[float, float, float]:
    """The usual range of pixels that suits the BatchNorms best: (lowest, extent, how far the means are off)."""
    found = []
    for low, high in _PIXEL_RANGES:
        with torch.no_grad():
            means, variances = _observe(model, seen, low + (high - low) * (0.5 + _CONTRAST * noise))
        found.append((float(means + variances), low, high - low, math.sqrt(float(means))))
    _, low, span, before = min(found)
    return low, span, before


def _total_variation(pixels: Tensor) -> Tensor:
    """How much neighbouring pixels differ: the mean absolute difference, vertically and horizontally."""
    variation: Tensor = pixels.diff(dim=2).abs().mean() + pixels.diff(dim=3).abs().mean()
    return variation


def _out_of_range(pixels: Tensor) -> Tensor:
    return (pixels - pixels.clamp(0, 1)).square().mean()
