"""Examples in a new order again and again, without the batches that they came in being put together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convrewrite.inputs import Inputs


def draws(batches: Sequence[Inputs], size: int, generator: torch.Generator) -> Iterator[Inputs]:
    """Batches of ``size`` examples without end: all examples in a new order, and again. Where there are fewer, some come twice
    in a batch. The generator is one of the CPU; the numbers stay where they are."""
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
    last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return torch.stack(list(rows)).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
