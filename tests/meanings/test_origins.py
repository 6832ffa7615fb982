"""What gave an output, also where a forward writes it into a tensor that was there before, and where its channels lie."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.meanings.kinds import Meaning, tell
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


class Headed(nn.Module):
    """A head, and what is done with its output."""

    def __init__(self, head: nn.Module, moved: Callable[[Tensor], Tensor], *, last: bool = False) -> None:
        super().__init__()
        self.head, self.moved, self.last = head, moved, last

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 4, 6, 5)`` -> what is made of the head's output."""
        return self.moved(self.head(x.permute(0, 2, 3, 1) if self.last else x))


@pytest.mark.parametrize(
    ("moved", "last", "axis"),
    [
        (lambda y: y, False, 1),
        (lambda y: y.permute(0, 2, 3, 1), False, -1),
        (lambda y: y.permute(0, 2, 3, 1).reshape(len(y), -1, 3), False, -1),
        (lambda y: y.view(2, 4, 3, 6, 5).permute(0, 3, 4, 1, 2).reshape(2, -1, 3).tanh() * 2, False, -1),
        (lambda y: y.view(2, 4, 3, 6, 5), False, 2),
        (lambda y: y.flatten(2).unsqueeze(1), False, 2),
        (lambda y: torch.stack([y, y], 1)[:, 0], False, 1),
        (lambda y: y.transpose(1, 3).unbind(2)[0], False, -1),
        (lambda y: F.interpolate(y.permute(0, 3, 1, 2), scale_factor=2.0, mode="bilinear"), True, 1),
        (lambda y: y.flatten(1, 2), True, -1),
        (lambda y: F.pixel_shuffle(y, 2), False, 1),
    ],
)
def test_the_axis_of_the_channels_is_followed(moved: Callable[[Tensor], Tensor], last: bool, axis: int) -> None:
    head = nn.Linear(4, 12) if last else nn.Conv2d(4, 12, 1)
    asked = {"output": Meaning("logits", "as asked")}
    assert tell(Headed(head, moved, last=last), [(torch.randn(2, 4, 6, 5),)], asked)["output"].axis == axis
