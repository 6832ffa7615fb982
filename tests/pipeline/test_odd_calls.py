"""Convolutions of parameters, of other numbers of examples than the model is given, and in functions that torch transforms."""

from typing import Any

import torch
from networks import natural
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite import Result, optimize
from convrewrite.rules.schema import Protect, Rule

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.7)
X = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions with a body between them, and a linear layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.last(self.body(F.relu(self.stem(x))))).mean((2, 3)))


def rewritten(model: nn.Module, example: Tensor = X) -> Result:
    data = natural(24, 3, 10, 10, torch.float32)
    return optimize(model.eval(), example, [RULE], data, measure=False, fast=True)


def test_parts_may_be_called_with_what_hangs_on_a_graph_of_gradients() -> None:
    class Sensitive(Net):
        """Gives, beside the scores, how they hang on the image."""

        def forward(self, x: Tensor) -> Any:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                scores = super().forward(x)
                return scores.detach(), torch.autograd.grad(scores.square().sum(), x)[0]

    result = rewritten(Sensitive(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(nn.ReLU()))))
    assert all(row.action == "rewritten" for row in result.report.sites)
