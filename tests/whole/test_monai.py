"""MONAI's two-dimensional networks, where MONAI is installed: skips, transposed convolutions, PReLU, several outputs."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrewrite import load, optimize, verify

pytestmark = pytest.mark.slow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    nets: Any = pytest.importorskip("monai.networks.nets")

WIDTHS = (16,) * 6


def images(count: int) -> Tensor:
    """Smooth noise, (N, 1, 32, 32)."""
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    return nn.functional.interpolate(noise, size=(32, 32), mode="bilinear", align_corners=False)


def unet() -> nn.Module:
    return nets.UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=3,
        channels=(16, 32, 64),
        strides=(2, 2),
        num_res_units=2,
        norm="BATCH",
    )


def basic_unet() -> nn.Module:
    """Its forward asks whether the skip is a tensor, which no graph can follow."""
    return nets.BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=WIDTHS, norm="batch")


def unet_plus_plus() -> nn.Module:
    return nets.BasicUNetPlusPlus(2, 1, 2, features=WIDTHS, deep_supervision=True, norm="batch")


def dynamic_unet() -> nn.Module:
    """It keeps the outputs of its deep supervision in a list of its own."""
    return nets.DynUNet(
        2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[16, 16, 32], deep_supervision=True, deep_supr_num=1
    )


@pytest.mark.parametrize(
    ("build", "outputs", "rewritten"),
    [
        (unet, 1, 8),
        pytest.param(basic_unet, 1, 17, marks=pytest.mark.soak),
        pytest.param(unet_plus_plus, 4, 0, marks=pytest.mark.soak),
        pytest.param(dynamic_unet, 1, 0, marks=pytest.mark.soak),
    ],
)
def test_the_whole_way(build: Callable[[], nn.Module], outputs: int, rewritten: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    result = optimize(model, images(1), calibration=images(40), refine=False, measure=outputs == 1)
    report = result.report
    assert sum(row.action == "rewritten" for row in report.sites) >= rewritten
    assert report.totals.macs.ratio < 0.5
    assert len(report.fidelity) == outputs
    assert all(row.passed for row in report.parity)
    assert max(row.relative_error for row in report.fidelity) < 1
    result.save(tmp_path / "out")
    again = verify(result.model, load(tmp_path / "out", build()), images(3))
    assert again.parity.passed
    assert all(output.relative_error == 0 for output in again.fidelity.outputs)
