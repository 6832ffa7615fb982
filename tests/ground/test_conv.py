"""Geometry, kinds and costs."""

import itertools

import numpy as np
import pytest
import torch
from networks import SPECS
from torch import nn
from torch.nn import functional as F

from convrewrite.conv import ConvSpec, Cost, Kind, canonical_kernel, classify, module_weight, within_strides

named_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@named_specs
def test_a_module_built_from_a_spec_has_that_spec(spec: ConvSpec) -> None:
    module = spec.build(torch.float64)
    assert ConvSpec.of(module) == spec
    assert (module.weight.shape, module.weight.dtype) == (spec.weight_shape, torch.float64)
    assert sum(p.numel() for p in module.parameters()) == spec.parameters


def test_channels_may_be_numbers_of_numpy_and_a_single_number_is_that_of_every_axis() -> None:
    made = nn.Conv2d(np.int64(4), np.int64(6), 3, stride=(2,), padding=(1,), groups=np.int64(2))  # type: ignore[arg-type]
    spec = ConvSpec.of(made)
    assert spec == ConvSpec(4, 6, (3, 3), (2, 2), (1, 1), groups=2)
    assert {type(number) for number in (spec.in_channels, spec.out_channels, spec.groups)} == {int}
    assert spec.output_size((9, 9)) == made(torch.zeros(1, 4, 9, 9)).shape[-2:]
    assert ConvSpec.of(nn.Conv1d(4, 6, 3, 2, 1)).stride == (1, 2)


@named_specs
def test_output_size_and_macs_are_those_of_the_module(spec: ConvSpec) -> None:
    module = spec.build()
    for size in [(9, 11), (12, 10)]:
        output = module(torch.zeros(1, spec.in_channels, *size)).shape[-2:]
        assert spec.output_size(size) == tuple(output)
        positions = size if spec.transposed else output
        assert spec.macs(size) == module.weight.numel() * positions[0] * positions[1]


def test_cost_counts_parameters_once_and_macs_per_call() -> None:
    spec = ConvSpec(2, 3, (3, 3), padding=(1, 1))
    assert spec.cost([(4, 4), (2, 2)]) == Cost(3 * 2 * 9 + 3, 3 * 2 * 9 * (16 + 4))
    assert spec.cost([]) == Cost(57, 0)
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_several_kernels_are_stored_each_and_convolved_with_as_one() -> None:
    """Mixing them multiplies every number once."""
    one = ConvSpec(2, 3, (3, 3), padding=(1, 1))
    two = ConvSpec(2, 6, (3, 3), padding=(1, 1), kernels=2)
    assert two.mixed == one
    assert two.parameters == 2 * one.parameters
    assert two.macs((4, 4)) == one.macs((4, 4)) + two.parameters
    assert classify(two) is Kind.DYNAMIC


@named_specs
def test_canonical_kernel_and_module_weight_are_inverse(spec: ConvSpec) -> None:
    weight = spec.build().weight.detach()
    kernel = canonical_kernel(weight, spec)
    assert kernel.shape == spec.kernel_shape
    assert torch.equal(module_weight(kernel, spec), weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_canonical_kernel_of_a_transposed_convolution_is_its_convolution_turned_round(groups: int) -> None:
    spec = ConvSpec(4, 6, (3, 2), groups=groups, transposed=True, bias=False)
    module = spec.build(torch.float64)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    kernel = canonical_kernel(module.weight, spec).flip(2, 3)
    torch.testing.assert_close(F.conv2d(F.pad(x, (1, 1, 2, 2)), kernel, groups=groups), module(x))


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (ConvSpec(4, 4, (3, 3)), Kind.STANDARD),
        (ConvSpec(4, 4, (2, 3)), Kind.STANDARD),
        (ConvSpec(4, 8, (1, 1), stride=(2, 2)), Kind.POINTWISE),
        (ConvSpec(4, 8, (1, 1), dilation=(2, 2)), Kind.POINTWISE),
        (ConvSpec(4, 8, (1, 3)), Kind.ASYMMETRIC),
        (ConvSpec(4, 8, (5, 1), dilation=(1, 2)), Kind.ASYMMETRIC),
        (ConvSpec(4, 8, (3, 3), dilation=(2, 1)), Kind.DILATED),
        (ConvSpec(4, 4, (3, 3), groups=4), Kind.DEPTHWISE),
        (ConvSpec(4, 8, (3, 3), groups=4), Kind.DEPTHWISE),
        (ConvSpec(2, 2, (3, 3), groups=2), Kind.DEPTHWISE),
        (ConvSpec(4, 8, (3, 3), groups=2, dilation=(2, 2)), Kind.GROUPED),
        (ConvSpec(1, 8, (3, 3)), Kind.STANDARD),
        (ConvSpec(4, 4, (3, 3), groups=4, transposed=True), Kind.TRANSPOSED),
    ],
)
def test_kinds(spec: ConvSpec, kind: Kind) -> None:
    assert classify(spec) is kind


def test_padding_pairs_give_the_surplus_of_same_to_the_far_side() -> None:
    assert ConvSpec(1, 1, (2, 4), padding="same", dilation=(1, 3)).padding_pairs() == ((0, 1), (4, 5))
    assert ConvSpec(1, 1, (3, 3), padding="valid").padding_pairs() == ((0, 0), (0, 0))
    assert ConvSpec(1, 1, (3, 3), padding=(1, 2)).padding_pairs() == ((1, 1), (2, 2))


def test_of_reads_modules_made_with_single_numbers() -> None:
    spec = ConvSpec.of(nn.Conv2d(2, 4, 3, 2, 1, 2, 2, bias=False, padding_mode="circular"))
    assert spec == ConvSpec(2, 4, (3, 3), (2, 2), (1, 1), (2, 2), 2, False, "circular")


def test_per_group_is_the_convolution_of_one_group() -> None:
    assert ConvSpec(8, 12, (3, 3), groups=4).per_group == ConvSpec(2, 3, (3, 3))


def test_describe_leaves_out_defaults_and_tells_geometries_apart() -> None:
    assert ConvSpec(64, 128, (3, 3)).describe() == "64->128 3x3"
    spec = ConvSpec(64, 128, (3, 1), (2, 1), (1, 0), (2, 1), 4, padding_mode="reflect")
    assert spec.describe() == "64->128 3x1 s2x1 p1x0 d2x1 g4 reflect"
    texts = [s.describe() for s in SPECS.values() if s.output_padding == (0, 0)]
    assert all(first != second for first, second in itertools.combinations(texts, 2))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_output_padding_within_the_stride_cuts_less_from_the_end(stride: int, dilation: int, padding: int) -> None:
    """An output padding adds to the end, as does what is not cut there."""
    kernel, x = torch.randn(1, 1, 5, dtype=torch.float64), torch.randn(1, 1, 7, dtype=torch.float64)
    whole = F.conv_transpose1d(x, kernel, stride=stride, dilation=dilation)
    for extra in range(max(stride, dilation)):
        wanted = F.conv_transpose1d(x, kernel, None, stride, padding, extra, 1, dilation)
        (begin, end), (left,) = within_strides((padding, padding), (extra,), (stride,))
        found = F.pad(whole, (0, left))[..., begin : whole.shape[-1] + left - end]
        assert torch.equal(found, wanted)
        assert (begin, min(end, left)) == (padding, 0) or left < stride
    assert within_strides((1, 2, 3, 4), (1, 0), (2, 1)) == ([1, 2, 3, 4], [1, 0])
    assert within_strides((1, 2, 3, 4), (2, 1), (2, 1)) == ([1, 2, 1, 3], [0, 0])


def test_a_patch_is_what_one_filter_sees() -> None:
    assert ConvSpec(8, 12, (3, 5), groups=2).patch == 4 * 3 * 5
    assert ConvSpec(8, 12, (3, 5), groups=2, transposed=True).patch == 4 * 3 * 5


def test_a_dilation_along_an_extent_of_one_moves_no_tap() -> None:
    spec = ConvSpec(8, 8, (1, 3), dilation=(4, 2))
    assert (spec.extents, spec.is_dilated) == ((1, 5), True)
    assert not ConvSpec(8, 8, (1, 3), dilation=(4, 1)).is_dilated
