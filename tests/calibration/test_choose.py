"""Batches lie channels last in memory where the model takes them so, and are the same numbers."""

import torch
from torch import Tensor, nn

from convrewrite.calibration.choose import channels_last


class Viewing(nn.Module):
    """Asks for a layout by ``view``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.view(len(x), -1)


def test_images_lie_channels_last_and_stay_the_same() -> None:
    batches = [(torch.randn(2, 3, 8, 8), torch.randn(2, 5)) for _ in range(2)]

    class Both(nn.Module):
        def forward(self, x: Tensor, vector: Tensor) -> Tensor:
            return x.mean((1, 2, 3)) + vector.sum(1)

    moved = channels_last(Both(), batches)
    for found, given in zip(moved, batches, strict=True):
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
        assert found[0].clone().is_contiguous(memory_format=torch.channels_last), "copies keep the layout"


def test_a_model_that_views_its_images_gets_them_as_they_were() -> None:
    batches = [(torch.randn(2, 3, 8, 8),)]
    (found,) = channels_last(Viewing(), batches)
    assert found[0] is batches[0][0]


def test_no_batches_stay_none() -> None:
    assert channels_last(Viewing(), []) == ()


def test_a_model_of_a_fixed_batch_is_tried_on_a_whole_one() -> None:
    class Four(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) != 4:
                raise ValueError("as a runtime refuses it")
            return x.mean((1, 2, 3))

    batches = [(torch.randn(4, 3, 8, 8),)]
    (found,) = channels_last(Four(), batches, 4)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    (refused,) = channels_last(Four(), batches)
    assert refused[0] is batches[0][0]
