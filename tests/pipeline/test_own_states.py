"""Models whose state is not all of their weights."""

from pathlib import Path
from typing import Any

import torch
from commands import images, small_network
from torch import Tensor, nn

from convrewrite import load, optimize


class Brief(nn.Module):
    """Gives as its state what was trained last alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network()
        self.register_buffer("shift", torch.randn(1))

    def state_dict(self, *args: Any, **named: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **named).items() if "12" in name}

    def forward(self, x: Tensor) -> Any:
        return self.inner(x + self.shift)


def test_a_state_dict_that_leaves_weights_out_is_completed(tmp_path: Path) -> None:
    made = optimize(Brief().eval(), images(1), calibration=images(16), measure=False, fast=True)
    assert any(row.action == "rewritten" for row in made.report.sites)
    assert torch.equal(load(made.save(tmp_path / "out"), Brief())(images(2)), made.model(images(2)))
