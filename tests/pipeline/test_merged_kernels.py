"""A network that merges its branches into one kernel at every call, as SPAN does: kept, and rewritten as ONNX."""

from pathlib import Path

import torch
from networks import natural
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite import Result, optimize
from convrewrite.rules.schema import Protect, Rule
from convrewrite.runtime import export

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.7)
X = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Merged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.skip, self.merged = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.merged.weight.data = self.branch.weight.data + F.pad(self.skip.weight.data, [1, 1, 1, 1])
        self.merged.bias.data = self.branch.bias.data + self.skip.bias.data
        return F.relu(self.merged(x))


def rewritten(model: nn.Module | Path) -> Result:
    return optimize(model, X, [RULE], natural(24, 3, 10, 10, torch.float32), measure=False, fast=True)


def test_a_kernel_merged_at_every_call_is_kept_with_a_way_out_that_is_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Merged(), nn.Conv2d(8, 4, 3)).eval()
    (kept,) = (row for row in rewritten(model).report.sites if row.name == "2.merged")
    assert "in an ONNX file exported from it, nothing asks" in (kept.reason or "")
    export(model, X, tmp_path / "model.onnx")
    assert [row.action for row in rewritten(tmp_path / "model.onnx").report.sites] == ["rewritten"] * 3
