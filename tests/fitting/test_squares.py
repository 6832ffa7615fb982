"""Sums of products by correlations of planes, against those of the patches themselves."""

import pytest
import torch
from networks import natural
from torch import Tensor
from torch.nn import functional as F

from convrewrite.conv import ConvSpec, Size
from convrewrite.fitting import moments, squares
from convrewrite.fitting.moments import Accumulator, Block, Moments, Windows
from convrewrite.fitting.squares import Correlations, Products

PLACE = torch.device("cpu")


def patches_of(planes: Tensor, kernel_size: Size, dilation: Size) -> Tensor:
    """All patches ``(P, d)`` of planes ``(N, H, W, C)``."""
    return F.unfold(planes.permute(0, 3, 1, 2), kernel_size, dilation).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 5), (5, 1), (2, 3), (1, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (3, 4)])
@pytest.mark.parametrize("size", [(9, 8), (2, 3), (1, 1)], ids=["large", "smaller than the kernel", "one position"])
def test_correlations_are_the_products_of_all_patches(kernel_size: Size, dilation: Size, size: Size) -> None:
    correlations, products = (
        Correlations(4, kernel_size, dilation, PLACE),
        Products(4 * kernel_size[0] * kernel_size[1], PLACE),
    )
    for count in (3, 1, 2):
        height, width = (s + d * (k - 1) for s, d, k in zip(size, dilation, kernel_size, strict=True))
        planes = torch.randn(count, height, width, 4, dtype=torch.float64)
        seen = correlations.add(planes, size)
        patches = patches_of(planes, kernel_size, dilation)
        assert torch.equal(torch.stack(seen, -1).flatten(1), patches)
        products.add(patches)
    expected, found = products.total(), correlations.total()
    assert torch.allclose(found, expected, rtol=0, atol=1e-12 * float(expected.diagonal().max()))
    assert torch.equal(found, found.T)


def test_parts_in_single_precision_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "PART", 50)
    correlations, products = Correlations(4, (3, 3), (1, 1), PLACE), Products(36, PLACE)
    for _ in range(5):
        planes = torch.randn(2, 9, 8, 4)
        correlations.add(planes, (7, 6))
        products.add(patches_of(planes, (3, 3), (1, 1)).double())
    expected = products.total()
    assert torch.allclose(correlations.total(), expected, rtol=0, atol=1e-5 * float(expected.diagonal().max()))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec(6, 8, (3, 3), padding=(1, 1)),
        ConvSpec(6, 8, (3, 3), padding="same", dilation=(2, 2)),
        ConvSpec(6, 8, (3, 5), padding=(0, 2), groups=2),
        ConvSpec(6, 8, (3, 3), padding=(2, 2), padding_mode="reflect"),
    ],
    ids=["padded", "dilated", "grouped", "reflected"],
)
def test_moments_are_the_same_either_way(spec: ConvSpec, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = natural(5, 6, 9, 10).double() + 1.5
    outputs = torch.randn(5, 8, 9, 10, dtype=torch.float64)[:, :, : 9 - 2 * (spec.kernel_size == (3, 5))]
    if spec.padding_mode == "reflect":
        outputs = torch.randn(5, 8, 11, 12, dtype=torch.float64)

    def gathered(dense: int) -> tuple[tuple[Moments, ...], Accumulator]:
        monkeypatch.setattr(moments, "DENSE", dense)
        accumulator = Accumulator(spec, 1, 0, keep=keep)
        for part in (slice(0, 3), slice(3, 5)):
            accumulator.add(x[part], outputs[part])
        return accumulator.result(), accumulator

    (expected, plain), (found, correlated) = gathered(10**9), gathered(1)
    assert not plain._correlations
    assert len(correlated._correlations) == spec.groups
    for a, b in zip(expected, found, strict=True):
        assert a.count == b.count
        for name in ("mean_p", "mean_y", "cov_p", "cov_yp", "var_y"):
            assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-11), name
    if keep:
        assert plain.kept is not None
        assert correlated.kept is not None
        for own, other in zip(plain.kept, correlated.kept, strict=True):
            assert torch.equal(own.patches, other.patches)
            assert torch.equal(own.outputs, other.outputs)


@pytest.mark.parametrize("dense", [1, 10**9], ids=["all positions", "some"])
@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec(6, 8, (3, 3), padding=(1, 1)),
        ConvSpec(6, 8, (3, 3), stride=(2, 1)),
        ConvSpec(6, 8, (3, 3), groups=2),
        ConvSpec(6, 8, (3, 3), padding=(2, 2), padding_mode="reflect"),
    ],
    ids=["padded", "strided", "grouped", "reflected"],
)
def test_patches_cut_from_planes_are_those_that_were_kept(
    spec: ConvSpec, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "DENSE", dense)
    height, width = spec.output_size((9, 10))
    given, outputs = natural(5, 6, 9, 10), torch.randn(5, 8, height, width)

    def gathered(cut: bool) -> tuple[tuple[Moments, ...], list[Block]]:
        accumulator = Accumulator(spec, 5 * height * width, 0, keep=True, cut=cut, limit=None if dense == 1 else 90)
        accumulator.add(given, outputs)
        assert accumulator.kept is not None
        return accumulator.result(), accumulator.kept

    (expected, kept), (found, planes) = gathered(False), gathered(True)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.cov_p, b.cov_p) and torch.equal(a.cov_yp, b.cov_yp)
    for own, other in zip(kept, planes, strict=True):
        assert isinstance(other.source, Windows)
        assert torch.equal(own.patches, other.patches) and torch.equal(own.outputs, other.outputs)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (ConvSpec(64, 8, (3, 3)), True),
        (ConvSpec(16, 8, (3, 3)), False),
        (ConvSpec(64, 8, (3, 3), stride=(2, 1)), False),
        (ConvSpec(64, 8, (3, 3), transposed=True), False),
        (ConvSpec(1024, 8, (1, 1)), False),
    ],
    ids=["large", "small patches", "strided", "transposed", "pointwise"],
)
def test_planes_are_correlated_where_kernels_step_through_large_ones(spec: ConvSpec, expected: bool) -> None:
    assert bool(Accumulator(spec, 100, 0)._correlations) is expected
    assert not Accumulator(spec, 10**7, 0)._correlations, "some positions are left out there"
