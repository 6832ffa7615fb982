"""Five networks of pytorchcv, where it is installed: from weights to parity, whatever their forwards do."""

import importlib
from pathlib import Path

import pytest
import torch

from convrewrite import optimize
from convrewrite.exporting import export
from convrewrite.verifying import check_parity

pytest.importorskip("pytorchcv.models")

NETWORKS = [
    ("resnet_cifar", "resnet20_cifar10", 3, 32),
    ("seresnet_cifar", "seresnet20_cifar10", 3, 32),
    ("diaresnet_cifar", "diaresnet20_cifar10", 3, 32),
    ("squeezenet", "squeezenet_v1_1", 3, 224),
    ("espcnet", "espcnet_cityscapes", 3, 64),
]


@pytest.mark.parametrize(("module", "name", "channels", "size"), NETWORKS)
def test_the_whole_way(module: str, name: str, channels: int, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)(pretrained=False).eval()
    image = torch.randn(1, channels, size, size)
    result = optimize(model, image, ["separable"], "weights", fast=True, measure=False)
    report = result.report
    assert sum(row.action == "rewritten" for row in report.sites) >= 3
    assert report.totals.macs.ratio < 1
    exported = export(result.model, image, tmp_path / "model.onnx")
    assert check_parity(result.model, exported.path, (image,)).passed
