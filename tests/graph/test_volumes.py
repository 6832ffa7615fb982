"""Three-dimensional convolutions cost what torch computes for them."""

from typing import Any

import pytest
import torch
from torch import nn

from convrewrite.conv import Kind, classify
from convrewrite.graph.volumes import Volume

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"kernel_size": (3, 1, 2), "stride": (2, 1, 3), "padding": (1, 0, 1), "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "groups": 2},
]


@pytest.mark.parametrize("changes", GEOMETRIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_and_macs(changes: dict[str, Any], transposed: bool) -> None:
    if transposed:
        changes = {key: value for key, value in changes.items() if key != "padding"}
    kind: Any = nn.ConvTranspose3d if transposed else nn.Conv3d
    conv = kind(4, 6, **{"kernel_size": 3, **changes})
    x = torch.randn(2, 4, 7, 6, 8)
    positions = x[0, 0].numel() if transposed else conv(x)[0, 0].numel()
    volume = Volume.of(conv)
    cost = volume.spec().cost([volume.input_size(x.shape)])
    assert cost.parameters == sum(parameter.numel() for parameter in conv.parameters())
    assert cost.macs == positions * conv.weight.numel()


def test_texts_and_kinds() -> None:
    plain = Volume.of(nn.Conv3d(4, 8, (3, 3, 1), stride=2, padding=(1, 1, 0), dilation=(1, 2, 1), groups=2)).spec()
    assert plain.describe() == "4->8 3x3x1 s2 p1x1x0 d1x2x1 g2"
    assert Volume.of(nn.Conv3d(4, 8, 3, padding="same")).spec().describe() == "4->8 3x3x3 same"
    kinds = [classify(Volume.of(conv).spec()) for conv in (nn.Conv3d(4, 8, 1), nn.ConvTranspose3d(4, 8, 2))]
    assert kinds == [Kind.POINTWISE, Kind.TRANSPOSED]
