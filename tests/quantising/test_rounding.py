"""A site that rounds as int8 does, before there is a file: near what onnxruntime's quantiser makes of it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_quantising import uneven
from torch import Tensor, nn

import convrewrite
from convrewrite.layers.branches import SumOfBranches
from convrewrite.onnx_files import OnnxModel
from convrewrite.quantising import quantise_file, rounded
from convrewrite.quantising.even import _Pair, _scale, even_scales


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


def test_even_scales_by_hand() -> None:
    largest, reading = np.array([1.0, 4.0, 16.0]), np.array([2.0, 2.0, 32.0])
    np.testing.assert_allclose(even_scales(largest, reading, 1.0), [16.0, 4.0, 1.0])  # all become 16
    shared = largest**-0.5 * reading**0.5  # [1.41, 0.71, 1.41]; the largest values become [1.41, 2.83, 22.6] of 16
    np.testing.assert_allclose(even_scales(largest, reading, 0.5), shared * 16 / (16 * 2**0.5))
    for power in (0.5, 1.0):
        assert (largest * even_scales(largest, reading, power)).max() == pytest.approx(16.0)
    unseen = even_scales(np.array([0.0, 1.0, 4.0]), np.array([1.0, 0.0, 1.0]), 1.0)
    np.testing.assert_allclose(
        unseen, [1.0, 1.0, 1.0]
    )  # what is always zero, or never read, stays, and so does one alone
    far = even_scales(np.array([1e-9, 1.0, 1e9]), np.ones(3), 1.0)
    np.testing.assert_allclose(far, np.array([2.0**12, 1.0, 2.0**-12]) * 1e9 / (1e9 * 2.0**-12))


def test_weights_are_read_by_the_groups_of_the_second_stage() -> None:
    """Two groups of two filters each, which read two channels: the largest weights that read each of the four."""
    second = np.array([[1.0, -2.0], [-3.0, 0.5], [5.0, 0.0], [4.0, -8.0]], np.float32)[:, :, None, None]
    first, bias = np.ones((4, 1, 1, 1), np.float32), np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    weights = {
        name: onnx.numpy_helper.from_array(array, name) for name, array in (("f", first), ("b", bias), ("s", second))
    }
    largest, reading = np.array([1.0, 2.0, 4.0, 8.0]), np.array([3.0, 2.0, 5.0, 8.0])
    _scale(weights, _Pair("x", "f", "b", "s", 2), largest, 0.5)
    scale = even_scales(largest, reading, 0.5)
    found = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in weights.items()}
    np.testing.assert_allclose(found["f"].ravel(), scale, rtol=1e-6)
    np.testing.assert_allclose(found["b"], bias * scale, rtol=1e-6)
    np.testing.assert_allclose(found["s"][:2, :, 0, 0], second[:2, :, 0, 0] / scale[:2], rtol=1e-6)
    np.testing.assert_allclose(found["s"][2:, :, 0, 0], second[2:, :, 0, 0] / scale[2:], rtol=1e-6)


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
