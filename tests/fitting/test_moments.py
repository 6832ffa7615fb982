"""Moments against what a convolution really computes, for every kind."""

import pytest
import torch
from goals import bias_of, unexplained
from networks import SPECS, natural, relative
from torch import Tensor, nn

from convrewrite.conv import ConvSpec, canonical_kernel
from convrewrite.fitting import moments as module
from convrewrite.fitting import squares
from convrewrite.fitting.moments import (
    Accumulator,
    Block,
    MomentBytes,
    Moments,
    position_limit,
    with_wanted_outputs,
)
from convrewrite.rewriting.surgery import build_conv

named_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
POINTWISE = ConvSpec(6, 5, (1, 1))


def convolution(spec: ConvSpec, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """An original module and another kernel that resembles its own."""
    original = spec.build(dtype)
    kernel = canonical_kernel(original.weight.detach(), spec)
    return original, kernel + 0.3 * kernel.std() * torch.randn_like(kernel)


def gathered(
    spec: ConvSpec, batches: list[tuple[Tensor, Tensor]], expected: int = 0, seed: int = 0
) -> tuple[Moments, ...]:
    accumulator = Accumulator(spec, expected, seed)
    for x, y in batches:
        accumulator.add(x, y)
    return accumulator.result()


def pooled(moments: tuple[Moments, ...], kernel: Tensor) -> float:
    weights = torch.stack([m.var_y.sum() for m in moments])
    errors = torch.tensor([unexplained(k, m) for m, k in zip(moments, kernel.chunk(len(moments)), strict=True)])
    return float((weights * errors).sum() / weights.sum())


@named_specs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_the_predicted_error_is_the_measured_one(spec: ConvSpec, dtype: torch.dtype) -> None:
    original, kernel = convolution(spec, dtype)
    x = natural(6, spec.in_channels, 9, 11, dtype)
    y = original(x)
    moments = gathered(spec, [(x, y)])
    bias = torch.cat([bias_of(k, m) for m, k in zip(moments, kernel.chunk(spec.groups), strict=True)])
    found = build_conv(ConvSpec(**{**fields(spec), "bias": True}), kernel, bias, x)(x)
    spread = (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
    measured = float((found - y).square().sum() / spread)
    assert measured > 1e-3
    assert pooled(moments, kernel) == pytest.approx(measured, rel=1e-3)


def fields(spec: ConvSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in ConvSpec.__dataclass_fields__}


@named_specs
@torch.no_grad()
def test_the_original_kernel_has_no_error_and_its_own_bias(spec: ConvSpec) -> None:
    original, _ = convolution(spec)
    x = natural(4, spec.in_channels, 9, 11)
    moments = gathered(spec, [(x, original(x))])
    kernel = canonical_kernel(original.weight, spec)
    for m, part in zip(moments, kernel.chunk(spec.groups), strict=True):
        assert unexplained(part, m) < 1e-10
        torch.testing.assert_close(part.flatten(1) @ m.cov_p, m.cov_yp)
    bias = torch.cat([bias_of(k, m) for m, k in zip(moments, kernel.chunk(spec.groups), strict=True)])
    expected = torch.zeros_like(bias) if original.bias is None else original.bias
    torch.testing.assert_close(bias, expected)


@torch.no_grad()
def test_moments_are_those_of_the_unfolded_patches() -> None:
    spec = ConvSpec(3, 4, (3, 2), (2, 1), (1, 0), (1, 2))
    x, y = natural(5, 3, 9, 8), torch.randn(5, 4, *spec.output_size((9, 8)), dtype=torch.float64)
    (moments,) = gathered(spec, [(x, y)])
    patches = nn.functional.unfold(x, (3, 2), (1, 2), (1, 0), (2, 1)).transpose(1, 2).flatten(0, 1)
    outputs = y.flatten(2).transpose(1, 2).flatten(0, 1)
    joint = torch.cov(torch.cat([patches, outputs], 1).T, correction=0)
    assert moments.count == len(patches)
    torch.testing.assert_close(moments.mean_p, patches.mean(0))
    torch.testing.assert_close(moments.mean_y, outputs.mean(0))
    torch.testing.assert_close(moments.cov_p, joint[:18, :18])
    torch.testing.assert_close(moments.cov_yp, joint[18:, :18])
    torch.testing.assert_close(moments.var_y, joint.diagonal()[18:])


@named_specs
@torch.no_grad()
def test_batches_of_any_size_give_what_one_batch_gives(spec: ConvSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    original, _ = convolution(spec)
    x = natural(7, spec.in_channels, 9, 8)
    y = original(x)
    whole = gathered(spec, [(x, y)])
    monkeypatch.setattr(module, "CHUNK", 1000)
    parts = gathered(spec, [(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 5), (5, 7))])
    for first, second in zip(whole, parts, strict=True):
        assert first.count == second.count
        for name in ("mean_p", "mean_y", "cov_p", "cov_yp", "var_y"):
            torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_positions_are_sub_sampled_when_there_are_too_many() -> None:
    spec = SPECS["standard"]
    original, kernel = convolution(spec)
    x = natural(40, 4, 16, 16)
    y = original(x)
    (whole,) = gathered(spec, [(x, y)])
    limit = position_limit(36, 1)
    (some,) = gathered(spec, [(x[:20], y[:20]), (x[20:], y[20:])], expected=4 * limit)
    assert (whole.count, some.count) == (40 * 256, 10 * 256)
    assert not torch.equal(some.cov_p, whole.cov_p)
    assert relative(some.cov_p, whole.cov_p) < 0.1
    assert unexplained(kernel, some) == pytest.approx(unexplained(kernel, whole), rel=0.1)


@torch.no_grad()
def test_the_seed_alone_decides_which_positions_are_taken() -> None:
    spec = SPECS["strided"]
    original, _ = convolution(spec)
    x = natural(8, 4, 12, 12)
    batches = [(x, original(x))]
    many = 3 * position_limit(36, 1)
    first, again, other = (gathered(spec, batches, many, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.cov_p, again.cov_p) and torch.equal(first.cov_yp, again.cov_yp)
    assert not torch.equal(first.cov_p, other.cov_p)


def test_the_limit_leaves_several_positions_per_unknown() -> None:
    assert all(position_limit(d, outputs) >= 10 * d for d in (9, 100, 576, 4608) for outputs in (1, d, 4 * d))
    assert position_limit(9, 9) == position_limit(9, 900) == 32_768, "more show nothing more"
    assert position_limit(9, 9, held_out=True) == 8_192
    assert position_limit(400, 400) == 25_000, "as many as are cheap"


@torch.no_grad()
def test_a_large_mean_does_not_swallow_the_covariance() -> None:
    exact = natural(16, 6, 12, 12)
    original = POINTWISE.build(torch.float64)
    (expected,) = gathered(POINTWISE, [(exact, original(exact))])
    offset = 1000.0
    x = (exact + offset).float()
    y = (original(exact) + offset).float()
    (found,) = gathered(POINTWISE, [(x[:8], y[:8]), (x[8:], y[8:])])
    assert relative(found.cov_p, expected.cov_p) < 1e-3
    assert relative(found.cov_yp, expected.cov_yp) < 1e-3
    torch.testing.assert_close(found.mean_p, expected.mean_p + offset, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_activations_are_summed_in_float32(dtype: torch.dtype) -> None:
    original, kernel = convolution(POINTWISE, torch.float32)
    x = natural(4, 6, 8, 8, dtype)
    y = original(x.float())
    (found,) = gathered(POINTWISE, [(x, y.to(dtype))])
    (expected,) = gathered(POINTWISE, [(x.float(), y)])
    assert relative(found.cov_p, expected.cov_p) < 1e-6
    assert unexplained(kernel, found) == pytest.approx(unexplained(kernel, expected), rel=0.05)


@pytest.mark.parametrize("scale", [1e-24, 1e24])
@torch.no_grad()
def test_outputs_whose_squares_float32_cannot_hold_have_their_variance(scale: float) -> None:
    x, y = natural(4, 6, 8, 8, torch.float32), torch.randn(4, 5, 8, 8)
    y[:, 1] = 0
    accumulator = Accumulator(POINTWISE, 0, 0, keep=True)
    accumulator.add(x, scale * y)
    (found,), (expected,), blocks = accumulator.result(), gathered(POINTWISE, [(x, y)]), accumulator.kept
    assert blocks is not None
    (other,) = with_wanted_outputs([found], blocks, [block.outputs for block in blocks])
    for own in (found, other):
        torch.testing.assert_close(own.var_y / scale**2, expected.var_y, rtol=1e-5, atol=0)


@torch.no_grad()
def test_constant_inputs_have_no_variance_and_a_finite_error() -> None:
    original, kernel = convolution(SPECS["no padding"])
    x = torch.ones(2, 4, 6, 6, dtype=torch.float64)
    (moments,) = gathered(SPECS["no padding"], [(x, original(x))])
    assert float(moments.cov_p.abs().max()) == 0
    assert unexplained(kernel, moments) == 0
    torch.testing.assert_close(kernel.flatten(1).sum(1) + bias_of(kernel, moments), moments.mean_y)


def test_a_result_needs_a_batch() -> None:
    with pytest.raises(AssertionError, match="no batch"):
        Accumulator(POINTWISE, 10, 0).result()


@torch.no_grad()
def test_a_covariance_summed_strip_by_strip_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original, _ = convolution(SPECS["standard"])
    x = natural(4, SPECS["standard"].in_channels, 9, 11, torch.float64)
    (whole,) = gathered(SPECS["standard"], [(x, original(x))])
    monkeypatch.setattr(squares, "STRIP", 7)
    (strips,) = gathered(SPECS["standard"], [(x, original(x))])
    torch.testing.assert_close(strips.cov_p, whole.cov_p)
    torch.testing.assert_close(strips.cov_p, strips.cov_p.T, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_other_wanted_outputs_at_the_same_positions_have_the_moments_of_their_own(groups: int) -> None:
    spec = ConvSpec(4, 6, (3, 2), padding=(1, 0), groups=groups)
    x, (y, other) = natural(5, 4, 6, 7), torch.randn(2, 5, 6, 6, 6, dtype=torch.float64) + 2
    accumulator = Accumulator(spec, 0, 0, keep=True)
    for part in (slice(0, 2), slice(2, 5)):
        accumulator.add(x[part], y[part])
    expected, found, blocks = gathered(spec, [(x, other)]), accumulator.result(), accumulator.kept
    assert blocks is not None
    wanted = [other[:2], other[2:]]
    outputs = [part.permute(1, 0, 2, 3).flatten(1).unflatten(0, (groups, -1)).transpose(1, 2) for part in wanted]
    for centred in (True, False):
        own = [m if centred else m.about_zero() for m in found]
        for a, b in zip(with_wanted_outputs(own, blocks, outputs), expected, strict=True):
            b = b if centred else b.about_zero()
            assert (a.count, a.centred) == (b.count, centred)
            for name in ("mean_p", "mean_y", "cov_p", "cov_yp", "var_y"):
                torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_bytes_are_those_of_what_is_held() -> None:
    spec = ConvSpec(4, 6, (3, 2), padding=(1, 2), groups=2)
    x, size = natural(1, 4, 5, 7, torch.float32), MomentBytes(spec)
    accumulator = Accumulator(spec, 0, 0, keep=True)
    accumulator.add(x, spec.build(torch.float32)(x), torch.zeros(1, 6, *spec.output_size((5, 7))))
    assert accumulator.kept is not None
    (block,) = accumulator.kept
    assert isinstance(block, Block) and block.skips is not None
    positions = block.patches.shape[1]
    assert size.outputs * positions == block.outputs.nbytes + block.skips.nbytes
    assert size.row * positions == block.patches.nbytes + block.outputs.nbytes + block.skips.nbytes
    assert size.squares == sum(m.cov_p.nbytes for m in accumulator.result())
    assert size.planes([(5, 7), (2, 3)]) == 4 * 4 * ((5 + 2) * (7 + 4) + (2 + 2) * (3 + 4))
