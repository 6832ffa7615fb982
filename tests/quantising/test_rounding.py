"""A site that rounds as int8 does, before there is a file: near what onnxruntime's quantiser makes of it."""

from pathlib import Path

import pytest
import torch
from test_quantising import uneven
from torch import Tensor, nn

import convrewrite
from convrewrite.layers.branches import SumOfBranches
from convrewrite.onnx_files import OnnxModel
from convrewrite.quantising import quantise_file, rounded


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(16, 8, 6, 6, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("groups", [1, 8])
@torch.no_grad()
def test_it_errs_as_much_as_the_int8_file(groups: int, tmp_path: Path) -> None:
    chain = nn.Sequential(*list(uneven(groups))[:2]).eval()
    exact = chain(inputs())
    found = error(rounded(chain)(inputs()), exact)
    convrewrite.export(chain, inputs(), tmp_path / "a.onnx")
    quantise_file(tmp_path / "a.onnx", tmp_path / "b.onnx", [(inputs(),)], [(inputs(),)])
    real = error(next(iter(OnnxModel(tmp_path / "b.onnx")(inputs()).values())), exact)
    assert 0.4 * real < found < 1.1 * real, "inputs and outputs are rounded in the file alone"


@torch.no_grad()
def test_even_scales_are_taken_where_they_lose_less(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = nn.Sequential(*list(uneven())[:2]).eval()
    exact = chain(inputs())
    found = error(rounded(chain)(inputs()), exact)
    monkeypatch.setattr("convrewrite.quantising.rounding.POWERS", (None,))
    assert error(rounded(chain)(inputs()), exact) > 3 * found


@pytest.mark.parametrize("levels", [127, 63])
@torch.no_grad()
def test_weights_lie_on_a_grid_for_every_filter_and_the_original_stays(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convrewrite.quantising.rounding.adds_bytes", lambda: levels == 127)
    conv = nn.Conv2d(8, 12, 3, groups=2)
    before = conv.weight.clone()
    changed = rounded(conv)
    assert torch.equal(conv.weight, before)
    for given, found in zip(before, changed.weight, strict=True):
        step = float(given.abs().max()) / levels
        assert float((found / step - (found / step).round()).abs().max()) < 1e-3
        assert float((found - given).abs().max()) <= 0.5001 * step
    assert torch.equal(changed.bias, conv.bias)


@torch.no_grad()
def test_zeros_and_float64_are_rounded_too() -> None:
    chain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)).double()
    chain[0].weight[1] = 0
    chain[0].bias[1] = 0
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert error(rounded(chain)(x), chain(x)) < 0.05
    nothing = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 1))
    nothing[0].weight.zero_()
    assert torch.equal(rounded(nothing)(x.float()), nothing(x.float()))


@torch.no_grad()
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_signals_are_rounded_as_images_of_one_line(padding_mode: str) -> None:
    chain = nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1, padding_mode=padding_mode), nn.Conv1d(8, 8, 5, stride=2, dilation=2, groups=2)
    )
    plane = nn.Sequential(
        nn.Conv2d(4, 8, (1, 3), padding=(0, 1), padding_mode=padding_mode),
        nn.Conv2d(8, 8, (1, 5), stride=(1, 2), dilation=(1, 2), groups=2),
    )
    for conv, twin in zip(chain, plane, strict=True):
        twin.weight.copy_(conv.weight[:, :, None])
        twin.bias.copy_(conv.bias)
    x = torch.randn(2, 4, 30)
    found = rounded(chain)(x)
    assert 1e-3 < error(found, chain(x)) < 0.05
    torch.testing.assert_close(found, rounded(plane)(x[:, :, None])[:, :, 0])


@torch.no_grad()
def test_what_rounds_later_inputs_keeps_the_ranges_of_the_first() -> None:
    chain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(2, 4, 8, 8)
    changed = rounded(chain)
    changed(x)
    assert error(changed(10 * x), chain(10 * x)) > 0.2, "beyond the ranges values are cut"


@torch.no_grad()
def test_what_branches_add_is_rounded_and_behind_a_relu_nothing_is_scaled() -> None:
    chains = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1)) for _ in range(2)]
    x = torch.randn(2, 6, 5, 5)
    alone = [rounded(chain)(x) for chain in chains]
    for chain, found in zip(chains, alone, strict=True):
        assert torch.equal(found, rounded(chain[2])(rounded(chain[0])(x).relu()))
    found = rounded(SumOfBranches(chains))(x)
    step = [float(part.max() - part.min()) / 255 for part in alone]
    assert 0 < float((found - sum(alone)).abs().max()) <= 0.51 * sum(step)
