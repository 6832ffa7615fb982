"""Inputs that are drawn and altered."""

from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from convrewrite.meanings import Meaning
from convrewrite.tuning.augmenting import Alterations, draws

LOGITS = {"output": Meaning("logits", "")}
VALUES = {"output": Meaning("values", "")}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_draws_give_every_example_once_before_any_again() -> None:
    batches = [(torch.arange(5.0)[:, None],), (torch.arange(5.0, 8.0)[:, None],)]
    drawn = torch.cat([inputs[0] for inputs in islice(draws(batches, 4, generator()), 4)])
    assert sorted(drawn[:8, 0].tolist()) == list(range(8)) == sorted(drawn[8:, 0].tolist())
    assert drawn[:8].tolist() != drawn[8:].tolist()


def test_a_draw_keeps_the_inputs_of_an_example_together_and_the_layout() -> None:
    images = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    first, second = next(draws([(images, images.sum((1, 2, 3)))], 9, generator()))
    assert len(first) == 9
    assert torch.equal(first.sum((1, 2, 3)), second)
    assert first.is_contiguous(memory_format=torch.channels_last)


class Brightness(nn.Module):
    """Knows neither left from right nor a pixel from the next."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


class LeftOrRight(nn.Module):
    """Tells one half from the other, and takes no notice of one row or column."""

    def forward(self, x: Tensor) -> Tensor:
        return 50 * torch.stack([x[..., 2:13].mean((1, 2, 3)), x[..., 15:26].mean((1, 2, 3))], 1)


def halves() -> tuple[Tensor]:
    x = torch.zeros(32, 1, 28, 28)
    x[:16, ..., :14] = 1
    x[16:, ..., 14:] = 1
    return (x,)


def test_only_alterations_are_used_that_change_little_of_what_the_original_says() -> None:
    batches = [halves()]
    assert Alterations.harmless(Brightness(), batches, LOGITS) == Alterations(True, True, True)
    assert Alterations.harmless(LeftOrRight(), batches, LOGITS) == Alterations(False, True, True)
    noise = [(torch.randn(32, 1, 28, 28),)]
    assert Alterations.harmless(nn.Identity(), noise, VALUES) == Alterations(False, False, True)


def test_what_is_no_image_is_only_mixed_and_what_is_no_real_number_not_even_that() -> None:
    rows = torch.randn(8, 5)
    assert Alterations.harmless(nn.Identity(), [(rows,)], VALUES) == Alterations(mixed=True)
    assert Alterations.harmless(nn.Identity(), [(rows, torch.arange(8))], VALUES) == Alterations()


def test_a_mixture_has_the_larger_share_of_its_own_example() -> None:
    codes = torch.eye(16)
    (mixed,) = Alterations(mixed=True)((codes,), generator())
    assert torch.allclose(mixed.sum(1), torch.ones(16))
    assert bool((mixed.diagonal() >= 0.5).all())
    assert bool((mixed.diagonal() < 0.9).any())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_are_mirrored_and_moved_by_a_pixel_of_28(layout: torch.memory_format) -> None:
    x = torch.randn(64, 2, 28, 28).contiguous(memory_format=layout)
    (found,) = Alterations(mirrored=True, moved=True)((x,), generator())
    assert found.is_contiguous(memory_format=layout)
    inner, ways = found[..., 1:-1, 1:-1], set()
    for index in range(len(x)):
        for mirrored in (False, True):
            image = x[index].flip(-1) if mirrored else x[index]
            for top in range(3):
                for left in range(3):
                    if torch.equal(image[:, top : top + 26, left : left + 26], inner[index]):
                        ways.add((index, mirrored, top, left))
    assert len({index for index, *_ in ways}) == 64, "every image is one of its own alterations"
    assert {mirrored for _, mirrored, _, _ in ways} == {False, True}
    assert {(top, left) for _, _, top, left in ways} == {(top, left) for top in range(3) for left in range(3)}


def test_inputs_of_other_kinds_are_left_beside_images() -> None:
    x, rows = torch.randn(4, 1, 16, 16), torch.randn(4, 3)
    moved, same = Alterations(moved=True)((x, rows), generator())
    assert not torch.equal(moved, x)
    assert torch.equal(same, rows)
