"""Embeddings whose vectors are zero or tiny are compared as others are."""

import pytest
import torch
from torch import Tensor

from convrewrite.meanings import Meaning
from convrewrite.runtime.comparison import measure_fidelity


class Given(torch.nn.Module):
    def __init__(self, scale: float, turned: float) -> None:
        super().__init__()
        self.scale, self.turned = scale, turned

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.turned * x.flip(1)) * self.scale


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_cosine_is_that_of_directions_at_any_size(scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    found, plain = (
        measure_fidelity(Given(size, 0.0), Given(size, 0.3), [(x,)], {"output": Meaning("embedding", "")}).outputs[0]
        for size in (scale, 1.0)
    )
    assert plain.cosine is not None and plain.cosine < 0.999
    assert found.cosine == pytest.approx(plain.cosine, rel=1e-6)


def test_equal_vectors_are_as_near_as_can_be_even_where_they_are_zero() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    x[:5] = 0.0
    found = measure_fidelity(Given(1.0, 0.0), Given(1.0, 0.0), [(x,)], {"output": Meaning("embedding", "")}).outputs[0]
    assert found.cosine == 1.0 and found.effect == 0.0
