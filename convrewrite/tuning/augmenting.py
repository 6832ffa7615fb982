"""More inputs from those there are, without labels: the original tells what any input should give.

Mixtures of two inputs, small shifts and mirror images are no inputs that anyone will give, but near those; a rewritten model that
agrees with the original on them too has seen more than the few it was fitted to (Beyer et al. 2022, "Knowledge distillation: a
good teacher is patient and consistent"). An alteration that changes much of what the original itself says, as a mirror image
does where outputs are maps, is left out: that it is told by measuring.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convrewrite.inputs import Inputs
from convrewrite.meanings import Meaning, effect_of
from convrewrite.modules import named_outputs, run

HARMLESS = 0.1
"""The effect on the original's outputs below which an alteration is used, in nats or squared relative error. Networks trained
with mirrored images change by 0.01 to 0.05 under them, one that tells left from right by more than one."""

STEPS_ACROSS = 28
"""Parts of an image's side, one of which it is shifted by at most: a pixel of 28, and eight of 224."""

SMALLEST = 8
"""Pixels of a side below which an image is neither shifted nor mirrored: there each one counts."""

EXAMPLES = 256
"""Inputs, at most, on which alterations are tried: enough to tell 0.01 from 0.1."""


@dataclass(frozen=True, slots=True)
class Alterations:
    """What is done to inputs that are drawn: ``mirrored`` and ``moved`` concern those that are images, ``mixed`` all of them."""

    mirrored: bool = False
    moved: bool = False
    mixed: bool = False

    @classmethod
    def harmless(cls, original: nn.Module, batches: Sequence[Inputs], meanings: Mapping[str, Meaning]) -> "Alterations":
        """Those that change little of what the original says. Mixtures are always taken where all inputs are real numbers:
        what they should give is somewhere between, and the original tells where."""
        if not all(tensor.is_floating_point() for tensor in batches[0]):
            return cls()
        if not any(_is_image(tensor) for tensor in batches[0]):
            return cls(mixed=True)

        mirrored, moved = (
            _effect(original, batches, meanings, alter) < HARMLESS for alter in (_mirror, _shift_by_most)
        )
        return cls(mirrored, moved, mixed=True)

    def __call__(self, inputs: Inputs, generator: torch.Generator) -> Inputs:
        """One batch, altered: every example by draws of its own. Draws come from the generator on the CPU, the numbers stay
        where they are."""
        count = len(inputs[0])
        if self.mirrored or self.moved:
            mirrored = torch.rand(count, generator=generator) < (0.5 if self.mirrored else 0.0)
            moves = torch.rand(2, count, generator=generator) * 2 - 1 if self.moved else torch.zeros(2, count)
            inputs = tuple(_taken(tensor, mirrored, moves) if _is_image(tensor) else tensor for tensor in inputs)
        if self.mixed:
            other = torch.randperm(count, generator=generator)
            shares = torch.rand(count, generator=generator) / 2
            inputs = tuple(_mixture(tensor, other, shares) for tensor in inputs)
        return inputs


def draws(batches: Sequence[Inputs], size: int, generator: torch.Generator) -> Iterator[Inputs]:
    """Batches of ``size`` examples without end: all examples in a new order, and again. Fewer examples than that are drawn
    again within a batch."""
    places = [(batch, row) for batch, inputs in enumerate(batches) for row in range(len(inputs[0]))]
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(places), generator=generator).tolist()
        chosen, waiting = [places[index] for index in waiting[:size]], waiting[size:]
        yield tuple(
            _stacked([batches[batch][position][row] for batch, row in chosen], batches[0][position])
            for position in range(len(batches[0]))
        )


def _stacked(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """The rows as one batch, in the memory layout of ``like``."""
    return _laid_out(torch.stack(list(rows)), like)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _is_image(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point() and min(tensor.shape[2:]) >= SMALLEST


def _first(batches: Sequence[Inputs], examples: int) -> Iterator[Inputs]:
    for batch in batches:
        yield batch
        examples -= len(batch[0])
        if examples <= 0:
            return


def _effect(
    original: nn.Module,
    batches: Sequence[Inputs],
    meanings: Mapping[str, Meaning],
    alter: Callable[[Tensor], Tensor],
) -> float:
    """How much another is what the original says of altered images."""
    pairs = (
        (
            named_outputs(run(original, inputs)),
            named_outputs(run(original, tuple(alter(tensor) if _is_image(tensor) else tensor for tensor in inputs))),
        )
        for inputs in _first(batches, EXAMPLES)
    )
    return effect_of(pairs, meanings)


def _mirror(images: Tensor) -> Tensor:
    return images.flip(3)


def _shift_by_most(images: Tensor) -> Tensor:
    count = len(images)
    return _taken(images, torch.zeros(count, dtype=torch.bool), torch.ones(2, count))


def _taken(images: Tensor, mirrored: Tensor, moves: Tensor) -> Tensor:
    """``(N, C, H, W)``, every image mirrored where ``mirrored (N,)`` says so, and moved by ``moves (2, N)``, rows and columns, in
    [-1, 1] of the most; what comes in from outside repeats the edge."""
    count, channels, height, width = images.shape
    rows, columns = _positions(height, moves[0]), _positions(width, moves[1])
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    device = images.device
    taken = images[
        torch.arange(count, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows.to(device)[:, None, :, None],
        columns.to(device)[:, None, None, :],
    ]
    return _laid_out(taken, images)


def _positions(extent: int, moves: Tensor) -> Tensor:
    """``(N, extent)``: which position comes to each place."""
    most = max(1, round(extent / STEPS_ACROSS))
    steps = (moves * (most + 0.5)).clamp(-most, most).round().long()
    return (torch.arange(extent)[None] + steps[:, None]).clamp(0, extent - 1)


def _mixture(tensor: Tensor, other: Tensor, shares: Tensor) -> Tensor:
    """Of every example and another, ``shares (N,)`` of the other."""
    weight = shares.to(tensor.device, tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1))
    return tensor.lerp(tensor[other.to(tensor.device)], weight)
