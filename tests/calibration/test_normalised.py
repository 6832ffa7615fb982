"""What calibration inputs become: normalised, in batches, and with their channels where the model has them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_batches import EXAMPLE, all_values, numbered, refusal

from convrewrite.calibration.batches import NO_INPUTS, batch_size, peek_example, read_calibration
from convrewrite.errors import CalibrationError


def test_of_several_inputs_the_first_is_normalised_and_all_stay() -> None:
    images, numbers = numbered(64), torch.arange(128.0).reshape(64, 2)
    found = read_calibration((images, numbers), (EXAMPLE[0], torch.zeros(1, 2)), mean=(1.0,), std=(2.0,))
    first, second = (torch.cat(column) for column in zip(*found.fit, *found.held_out, strict=True))
    assert sorted(first[:, 0, 0, 0].tolist()) == [(i - 1) / 2 for i in range(64)]
    assert torch.equal(second[:, 0] / 2, first[:, 0, 0, 0] * 2 + 1), "each row stays with its image"
    assert sorted(second[:, 1].tolist()) == [2 * i + 1 for i in range(64)]


def test_channels_are_normalised_where_the_model_has_them() -> None:
    images = torch.rand(64, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
    first = read_calibration(images, EXAMPLE, mean=mean, std=std)
    last = read_calibration(images.permute(0, 2, 3, 1), (torch.zeros(1, 8, 6, 3),), mean=mean, std=std)
    torch.testing.assert_close(last.fit[0][0], first.fit[0][0].permute(0, 2, 3, 1))
    signals = read_calibration(images[..., 0], (torch.zeros(1, 3, 8),), mean=mean, std=std)
    torch.testing.assert_close(signals.fit[0][0], first.fit[0][0][..., 0])
    plain = read_calibration(torch.arange(64.0), (torch.zeros(1),), mean=(1.0,))
    assert all_values(plain) == [float(i - 1) for i in range(64)]
    assert "mean: expected finite numbers, found [inf]" in refusal(numbered(9), mean=(float("inf"),))
    assert "limit and batch: expected at least 1, found 1 and 0" in refusal(numbered(9), limit=1, batch=0)


@pytest.mark.parametrize(
    ("numbers", "expected"), [(10, 32), (39_062, 32), (3 * 224 * 224, 8), (1_250_000, 1), (2_000_000, 1)]
)
def test_a_batch_has_as_many_examples_as_memory_has_room_for(numbers: int, expected: int) -> None:
    assert batch_size((torch.empty(5, 1), torch.empty(5, numbers))) == expected


def test_images_with_their_channels_last_are_shown_channels_first(tmp_path: Path) -> None:
    for shape, expected in (
        ((5, 8, 6, 3), (1, 3, 8, 6)), ((5, 8, 6, 1), (1, 1, 8, 6)), ((5, 3, 8, 6), (1, 3, 8, 6)), ((5, 3, 6, 3), (1, 3, 6, 3)),
        ((5, 8, 6, 4), (1, 8, 6, 4)), ((5, 8, 3), (1, 8, 3)),
    ):  # fmt: skip
        np.save(tmp_path / "c.npy", np.arange(np.prod(shape)).reshape(shape))
        (found,) = peek_example(str(tmp_path / "c.npy")) or ()
        assert found.shape == expected
    np.save(tmp_path / "c.npy", np.zeros((0, 3)))
    with pytest.raises(CalibrationError, match=NO_INPUTS):
        peek_example(str(tmp_path / "c.npy"))
