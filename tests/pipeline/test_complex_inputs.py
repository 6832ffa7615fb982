"""A model that takes complex numbers."""

import pytest
import torch
from torch import Tensor, nn

import convrewrite
from convrewrite.errors import ExportError


class Spectra(nn.Module):
    """Convolutions of what a spectrum is of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(torch.fft.ifft2(x).real).relu())


def spectra(count: int) -> Tensor:
    return torch.fft.fft2(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)))


def test_it_is_fitted_to_complex_inputs() -> None:
    result = convrewrite.optimize(
        Spectra().eval(), spectra(2), ["separable"], [spectra(16)] * 4, fast=True, measure=False, any_speed=True
    )
    assert [row.action for row in result.report.sites] == ["kept", "rewritten"]
    assert result.report.calibration.fitted_on > 0
    assert result.report.fidelity[0].relative_error < 1


def test_it_has_no_onnx_form_and_is_told_so_before_the_work() -> None:
    with pytest.raises(ExportError, match="expected inputs of real numbers, found complex ones"):
        convrewrite.optimize(Spectra().eval(), spectra(2), ["separable"], [spectra(16)], fast=True)
