"""Examples that are drawn again and again."""

from itertools import islice

import pytest
import torch
from torch import Tensor

from convrewrite.tuning.drawing import _blended, _patched, _with_boxes, draws, mingled


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


@pytest.mark.parametrize("shape", [(64, 2, 30), (64, 2, 10, 12), (64, 1, 6, 7, 8)], ids=["signal", "image", "volume"])
def test_half_of_the_examples_get_a_box_of_another(shape: tuple[int, ...]) -> None:
    own = torch.arange(64.0).view(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
    (found,) = _patched((own,), generator())
    foreign = found != own
    changed = foreign.flatten(1).any(1)
    assert 16 < int(changed.sum()) < 48
    for example in changed.nonzero()[:, 0].tolist():
        assert len(found[example][foreign[example]].unique()) == 1, "of one other"
        assert_box(foreign[example])


def assert_box(inside: Tensor) -> None:
    """All channels alike, without a gap along any axis, and as large as the product of the sides."""
    assert bool((inside == inside[0]).all())
    box, sides = inside[0], 1
    for axis in range(box.dim()):
        places = box.movedim(axis, 0).reshape(box.shape[axis], -1).any(1).nonzero()[:, 0]
        assert len(places) == places[-1] - places[0] + 1
        sides *= len(places)
    assert int(box.sum()) == sides


def test_several_inputs_of_an_example_get_the_same_part_of_the_same_other() -> None:
    image = torch.arange(32.0).view(32, 1, 1, 1).expand(32, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    first, second = _patched((image, image[:, :1, ::2, ::2].contiguous()), generator())
    assert first.is_contiguous(memory_format=torch.channels_last)
    middle = first[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    agree = (middle == second[:, 0, :, :, None]).any(-1)
    assert bool(agree.all())


@pytest.mark.parametrize("shape", [(64, 2, 30), (64, 2, 10, 12), (64, 1, 6, 7, 8)], ids=["signal", "image", "volume"])
def test_half_of_the_examples_are_blended_with_another(shape: tuple[int, ...]) -> None:
    own = 2.0 ** torch.arange(-32, 32).view(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
    (found,) = _blended((own,), generator())
    changed = (found != own).flatten(1).any(1)
    assert 16 < int(changed.sum()) < 48
    flat = found.flatten(1)
    assert torch.allclose(flat, flat[:, :1].expand_as(flat)), "one part of the other all over an example"


def test_several_inputs_of_an_example_are_blended_alike_in_their_layouts() -> None:
    image = torch.randn(32, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    first, second = _blended((image, image[:, :1, ::2, ::2].contiguous()), generator())
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(first[:, :1, ::2, ::2], second)


def test_examples_are_blended_and_patched_in_half_precision_too() -> None:
    image = torch.randn(16, 3, 8, 8).bfloat16()
    (found,) = mingled((image,), generator())
    assert found.dtype == image.dtype and found.shape == image.shape
    assert 0 < int((found != image).flatten(1).any(1).sum()) < 16


@pytest.mark.parametrize("other", [torch.arange(8), torch.ones(8, 5), torch.ones(8, 1, 4, 4).long()])
def test_what_is_no_signal_stays_as_it_is(other: Tensor) -> None:
    inputs = (torch.randn(8, 1, 6, 6), other)
    assert mingled(inputs, generator()) is inputs


def test_signals_without_channels_are_blended_alone() -> None:
    signals = torch.randn(16, 40)
    (found,) = mingled((signals,), generator())
    changed = (found != signals).any(1)
    assert 0 < int(changed.sum()) < 16
    assert all(_is_blend(row, signals) for row in found[changed])


def _is_blend(row: Tensor, signals: Tensor) -> bool:
    """Whether a row lies between two of the signals."""
    for first in signals:
        for second in signals:
            way = second - first
            part = (row - first) @ way / way.square().sum().clamp_min(1e-9)
            if 0 < part < 1 and torch.allclose(first + part * way, row, atol=1e-5):
                return True
    return False


@pytest.mark.parametrize("shape", [(32, 2, 30), (32, 2, 10, 12), (32, 1, 6, 7, 8)], ids=["signal", "image", "volume"])
def test_what_has_channels_is_blended_and_then_patched(shape: tuple[int, ...]) -> None:
    given, random = torch.randn(shape), generator()
    expected = _patched(_blended((given,), random), random)
    assert torch.equal(mingled((given,), generator())[0], expected[0])
    assert not torch.equal(expected[0], given)
    with_numbers = (given, torch.randn(32, 5))
    assert mingled(with_numbers, generator()) is with_numbers, "a box has no place in numbers without axes"


def test_signals_without_channels_are_never_patched() -> None:
    signals = torch.randn(16, 40)
    assert torch.equal(mingled((signals,), generator())[0], _blended((signals,), generator())[0])


def test_boxes_by_hand() -> None:
    """A middle of 0.5 and a size of 0.36, the root of which is 0.6, of an axis of five: from 0.2 to 0.8."""
    own = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 5, 4)
    boxes = torch.tensor([[[0.5, 0.5], [0.0, 0.5]], [[0.36, 0.36], [0.25, 1.0]]])
    found = _with_boxes(own, torch.tensor([1, 0]), torch.tensor([True, False]), boxes)
    expected = torch.zeros(5, 4)
    expected[1:4, :1] = 1  # along the second axis up to 0.25, cut off at its beginning
    assert torch.equal(found[0, 0], expected)
    assert torch.equal(found[1], own[1])
