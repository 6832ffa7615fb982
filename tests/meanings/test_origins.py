"""What gave an output, where a forward writes it into a tensor that was there before."""

import torch
from torch import Tensor, nn

from convrewrite.meanings.origins import Origin, origins_noted


class Written(nn.Module):
    """Class scores in an output of its own, whole or in two halves."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.halves, self.head = halves, nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 4)`` -> ``(N, 6)``."""
        scores = self.head(x).softmax(1)
        out = scores.new_zeros(scores.shape) if self.halves else torch.empty(scores.shape)
        if not self.halves:
            return out.copy_(scores)
        out[:, :3], out[:, 3:] = scores[:, :3], scores[:, 3:]
        return out


def test_what_is_copied_says_where_it_comes_from_not_where_it_goes() -> None:
    for halves in (False, True):
        model = Written(halves)
        with torch.no_grad(), origins_noted(model) as origins:
            outputs = {"scores": model(torch.randn(2, 4))}
        assert origins(outputs) == {"scores": Origin("softmax", "")}
