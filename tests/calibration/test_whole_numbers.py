"""Models that take whole numbers get those that were given, and no others."""

import numpy as np
import pytest
import torch

from convrewrite.calibration import read_calibration
from convrewrite.errors import CalibrationError


def pixels(dtype: torch.dtype) -> tuple[torch.Tensor]:
    return (torch.zeros(1, 3, 4, 4, dtype=dtype),)


@pytest.mark.parametrize(
    ("value", "dtype"), [(300, torch.uint8), (-1, torch.uint8), (128, torch.int8), (2**40, torch.int32)]
)
def test_numbers_that_do_not_fit_are_refused(value: int, dtype: torch.dtype) -> None:
    given = torch.full((70, 3, 4, 4), 1, dtype=torch.int64)
    assert read_calibration(given, pixels(dtype)).fit[0][0].dtype == dtype
    given[3, 0, 0, 0] = value
    with pytest.raises(CalibrationError, match=f"expected whole numbers that {dtype} holds, .*found {value};"):
        read_calibration(given, pixels(dtype))


def test_larger_types_without_a_sign_are_compared_too() -> None:
    given = np.full((70, 3, 4, 4), 40_000, np.uint16)
    assert read_calibration(given, pixels(torch.int32)).fit[0][0].dtype == torch.int32
    with pytest.raises(CalibrationError, match="found 40000;"):
        read_calibration(given, pixels(torch.int16))


def test_any_number_is_a_truth_value() -> None:
    data = read_calibration(torch.full((70, 3, 4, 4), 255, dtype=torch.uint8), pixels(torch.bool))
    assert bool(data.fit[0][0].all())


@pytest.mark.parametrize("options", [{"mean": (0.5,)}, {"std": (0.2,)}])
def test_whole_numbers_are_not_normalised(options: dict[str, tuple[float]]) -> None:
    given = torch.zeros(70, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(CalibrationError, match=r"mean, std: .* found one that takes torch\.uint8"):
        read_calibration(given, pixels(torch.uint8), **options)  # type: ignore[arg-type]
