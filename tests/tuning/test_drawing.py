"""Examples that are drawn again and again."""

from itertools import islice

import torch

from convrewrite.tuning.drawing import draws


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_example_comes_once_before_any_comes_again() -> None:
    batches = [(torch.arange(5.0)[:, None],), (torch.arange(5.0, 8.0)[:, None],)]
    drawn = torch.cat([inputs[0] for inputs in islice(draws(batches, 4, generator()), 4)])
    assert sorted(drawn[:8, 0].tolist()) == list(range(8)) == sorted(drawn[8:, 0].tolist())
    assert drawn[:8].tolist() != drawn[8:].tolist()


def test_the_inputs_of_an_example_stay_together_in_their_layout() -> None:
    images = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    first, second = next(draws([(images, images.sum((1, 2, 3)))], 9, generator()))
    assert len(first) == 9
    assert torch.allclose(first.sum((1, 2, 3)), second, rtol=1e-5, atol=1e-5)
    assert first.is_contiguous(memory_format=torch.channels_last)
