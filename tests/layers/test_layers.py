import copy
import io
import math
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from layer_cases import INPUTS, LAYERS, OUTPUTS, build
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from convrewrite import layers
from convrewrite.conv import ConvSpec
from convrewrite.layers.separable import SeparableConv2d
from convrewrite.layers.single import DilatedConv2d, SingleConv2d, StandardConv2d
from convrewrite.layers.transposed import TransposedConv2d

SIZE = (11, 14)
every_layer = pytest.mark.parametrize("name", LAYERS)


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, INPUTS, *SIZE, dtype=dtype)


def test_the_nine_kinds_and_the_sum_are_what_the_package_has() -> None:
    kinds = [
        "Asymmetric", "Depthwise", "Dilated", "Dynamic", "Grouped", "Pointwise", "Separable", "Standard", "Transposed",
    ]  # fmt: skip
    assert sorted(layers.__all__) == sorted(["SumOfBranches", *(f"{kind}Conv2d" for kind in kinds)])


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "transposed"])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 2), (2, 3), ((4, 3), (1, 2)), (5, (2, 1))])
def test_same_gives_the_size_over_the_stride_for_every_geometry(name: str, kernel_size: Any, dilation: Any) -> None:
    spread = 1 if name == "standard" else dilation
    for stride, mode in product([(1, 1), (2, 2), (3, 1)], ["zeros", "reflect", "replicate", "circular"]):
        layer = build(name, kernel_size=kernel_size, stride=stride, dilation=spread, padding_mode=mode)
        wanted = tuple(math.ceil(n / s) for n, s in zip(SIZE, stride, strict=True))
        assert layer(images()).shape == (2, OUTPUTS, *wanted), (stride, mode)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (2, 1), ((4, 3), (1, 2)), ((2, 5), (3, 1))])
def test_same_pads_as_torch_does_and_strides_take_every_nth(kernel_size: Any, dilation: Any, padding_mode: Any) -> None:
    dense = nn.Conv2d(
        INPUTS, 6, kernel_size, padding="same", dilation=dilation, padding_mode=padding_mode, dtype=torch.float64
    )
    x = images(dtype=torch.float64)
    for stride in (1, 2, 3):
        layer = SingleConv2d(
            INPUTS, 6, kernel_size, stride, "same", dilation, padding_mode=padding_mode, dtype=torch.float64
        )
        layer.load_state_dict(dense.state_dict())
        torch.testing.assert_close(layer(x), dense(x)[:, :, ::stride, ::stride])
        assert ConvSpec.of(layer).output_size(SIZE) == layer(x).shape[2:]


def test_padding_is_a_number_a_pair_or_a_word() -> None:
    x = images()
    assert StandardConv2d(INPUTS, 4, 3, padding=2)(x).shape[2:] == (13, 16)
    assert StandardConv2d(INPUTS, 4, 3, padding=(0, 2))(x).shape[2:] == (9, 16)
    assert SeparableConv2d(INPUTS, 4, 3, padding="valid")(x).shape[2:] == (9, 12)
    assert DilatedConv2d(INPUTS, 4, 3, padding="valid", stride=2)(x).shape[2:] == (4, 5)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, (1, 3)])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5, (2, 3)])
def test_transposed_same_is_the_transpose_of_the_convolution_that_same_makes(
    kernel_size: Any, stride: Any, dilation: int
) -> None:
    up = TransposedConv2d(4, 6, kernel_size, stride, dilation=dilation, bias=False, dtype=torch.float64)
    down = SingleConv2d(6, 4, kernel_size, stride, dilation=dilation, bias=False, dtype=torch.float64)
    down.load_state_dict(up.state_dict())
    small = torch.randn(1, 4, 4, 5, dtype=torch.float64)
    strides = (stride, stride) if isinstance(stride, int) else stride
    large = torch.randn(1, 6, 4 * strides[0], 5 * strides[1], dtype=torch.float64)
    assert up(small).shape == large.shape
    torch.testing.assert_close((up(small) * large).sum(), (small * down(large)).sum())


@every_layer
@pytest.mark.parametrize("changes", [{}, {"stride": 2, "bias": False}, {"kernel_size": (4, 3), "padding": "valid"}])
def test_cost_is_what_is_counted_while_the_layer_runs(name: str, changes: dict[str, Any]) -> None:
    layer: Any = build(name, **changes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(images(1))
    cost = layer.cost(SIZE)
    assert cost.macs == counter.get_total_flops() // 2
    assert cost.parameters == sum(parameter.numel() for parameter in layer.parameters())


@every_layer
def test_layers_train_copy_and_pickle(name: str) -> None:
    layer = build(name)
    x = images()
    layer(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        assert type(layer).__name__ in repr(layer)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    fresh = build(name)
    assert not torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(fresh(x), layer(x))


@every_layer
def test_layers_work_in_float64_and_channels_last(name: str) -> None:
    layer = build(name)
    x = images()
    expected = layer(x)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), expected)
    exact = copy.deepcopy(layer).double()(x.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), expected)
    assert next(build(name, dtype=torch.float64).parameters()).dtype == torch.float64
    assert next(iter(LAYERS[name](8, 16, device="meta").parameters())).is_meta


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "dynamic"])
@pytest.mark.parametrize("kernel_size", [3, 4])
def test_layers_go_through_torch_script(name: str, kernel_size: int) -> None:
    layer, x = build(name, kernel_size=kernel_size), images()
    branches = layers.SumOfBranches([layer, copy.deepcopy(layer)])
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    torch.testing.assert_close(torch.jit.script(branches)(x), branches(x))


@every_layer
def test_layers_can_be_followed_by_torch_fx(name: str) -> None:
    layer = build(name, kernel_size=4)
    traced = fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    for batch in (1, 3):
        x = images(batch)
        assert torch.equal(traced(x), F.relu(layer(x)))


@every_layer
def test_layers_made_without_memory_start_like_others_once_they_have_some(name: str) -> None:
    layer = build(name).to("meta").to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(math.nan)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer(images()).isfinite().all()
    assert {key: float(value) for key, value in layer.named_buffers()} == {
        key: float(value) for key, value in build(name).named_buffers()
    }


@every_layer
def test_an_empty_batch_gives_an_empty_output(name: str) -> None:
    layer = build(name)
    assert layer(images(0)).shape == (0, *layer(images(1)).shape[1:])


@pytest.mark.parametrize("name", ["standard", "pointwise", "separable", "grouped, mixed", "transposed", "dynamic"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stride": 0}, "stride: expected one or two whole numbers from 1, found 0"),
        ({"stride": (1, 2, 3)}, r"stride: .*found \(1, 2, 3\)"),
        ({"stride": 1.5}, "stride: expected one or two whole numbers from 1, found 1.5"),
        ({"padding": None}, "padding: expected one or two whole numbers from 0, found None"),
        ({"padding": "full"}, "padding: expected 'same', 'valid' or numbers, found 'full'"),
        ({"padding": -1}, "padding: expected one or two whole numbers from 0, found -1"),
        ({"padding_mode": "mirror"}, "padding_mode: expected one of zeros, reflect.* found 'mirror'"),
        ({"padding_mode": ["zeros"]}, r"padding_mode: expected one of zeros, reflect.* found \['zeros'\]"),
        ({"groups": 3}, "in_channels: expected a multiple of groups=3, found 8"),
        ({"groups": 0}, "groups: expected a whole number from 1, found 0"),
        ({"bias": "False"}, "bias: expected True or False, found 'False'"),
    ],
)
def test_wrong_arguments_are_named(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"Conv2d: {words}"):
        build(name, **changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layers.StandardConv2d(8, 8, 1), "StandardConv2d: kernel_size: .*use PointwiseConv2d"),
        (lambda: layers.StandardConv2d(8, 8, groups=2), "groups: expected 1, found 2; use GroupedConv2d"),
        (lambda: layers.StandardConv2d(8, 8, groups=8), "groups: expected 1, found 8; use DepthwiseConv2d"),
        (lambda: layers.StandardConv2d(8, 8, dilation=2), "dilation: expected 1, .*use DilatedConv2d"),
        (lambda: layers.DilatedConv2d(8, 8, dilation=1), "dilation: expected more than 1.*use StandardConv2d"),
        (lambda: layers.DilatedConv2d(8, 8, (3, 1), dilation=(1, 2)), "dilation: expected more than 1"),
        (lambda: layers.DepthwiseConv2d(8, 12), "out_channels: expected a multiple of groups=8, found 12"),
        (lambda: layers.DepthwiseConv2d(8, 8, groups=4), "groups: expected in_channels=8, found 4"),
        (lambda: layers.GroupedConv2d(8, 8, groups=1), "groups: expected 2 or more, found 1"),
        (lambda: layers.GroupedConv2d(8, 8, groups=8), "groups: expected less than in_channels=8"),
        (lambda: layers.GroupedConv2d(8, 8, rank=2), "rank: .*give mix=True"),
        (lambda: layers.GroupedConv2d(8, 8, mix="no"), "mix: expected True or False, found 'no'"),
        (lambda: layers.GroupedConv2d(8, 8, mix=True, rank=0), "rank: expected a whole number from 1, found 0"),
        (lambda: layers.SeparableConv2d(8, 8, 1), "SeparableConv2d: 8->8 1x1 same: a 1x1 kernel has no spatial"),
        (lambda: layers.SeparableConv2d(8, 8, multiplier=0), "multiplier: expected a whole number from 1"),
        (lambda: layers.SeparableConv2d(8, 8, order="depthwise"), "order: expected 'depthwise-first' or 'pointw"),
        (lambda: layers.AsymmetricConv2d(8, 8, (1, 3)), "no second axis to split off"),
        (lambda: layers.AsymmetricConv2d(8, 8, rank=0), "rank: expected a whole number from 1"),
        (lambda: layers.TransposedConv2d(8, 8, padding_mode="reflect"), "padding_mode: expected 'zeros'"),
        (lambda: layers.TransposedConv2d(8, 8, output_padding=1), "output_padding: padding='same' sets it"),
        (lambda: layers.TransposedConv2d(8, 8, padding=1, output_padding=2), "output_padding: expected less than"),
        (lambda: layers.DynamicConv2d(8, 8, kernels=0), "kernels: expected a whole number from 1"),
        (lambda: layers.DynamicConv2d(8, 8, temperature=0.0), "temperature: expected a finite number above 0"),
        (lambda: layers.DynamicConv2d(8, 8, temperature="1"), "temperature: expected a finite number above 0"),
    ],
)
def test_what_is_not_of_the_kind_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("order", ["vertical-first", "horizontal-first"])
@pytest.mark.parametrize(
    "changes", [{}, {"stride": 2}, {"stride": (2, 1), "kernel_size": (3, 5)}, {"groups": 4}, {"kernel_size": 7}]
)
def test_asymmetric_takes_about_half_the_macs_unless_told_otherwise(order: str, changes: dict[str, Any]) -> None:
    layer = layers.AsymmetricConv2d(64, 96, order=order, **changes)
    whole = SingleConv2d(64, 96, **changes)
    assert layer.cost((64, 64)).macs / whole.cost((64, 64)).macs == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", ["standard", "asymmetric", "transposed", "dynamic"])
def test_no_cost_is_given_for_planes_that_the_layer_does_not_take(name: str) -> None:
    layer: Any = build(name, kernel_size=5, stride=1, padding=4 if name == "transposed" else 0)
    with pytest.raises(ValueError, match=r"Conv2d: input_size: expected planes that .* makes an output of, found 1x1"):
        layer.cost((1, 1))  # two negative extents have a product above zero
    with pytest.raises(ValueError, match=r"Conv2d: input_size: expected .* whole numbers from 1, found \(0, 9\)"):
        layer.cost((0, 9))
    assert layer.cost(11) == layer.cost((11, 11))


def test_a_grouped_layer_mixes_only_when_told_to() -> None:
    x = images()
    for mix in (False, True):
        layer = build("grouped", mix=mix)
        changed = x.clone()
        changed[:, :2] += 1
        differs = (layer(changed) != layer(x)).any(dim=3).any(dim=2).any(dim=0)
        assert differs.tolist() == [True] * (OUTPUTS if mix else OUTPUTS // 4) + [False] * (0 if mix else 12)


def test_a_stage_that_was_replaced_still_takes_part() -> None:
    layer: Any = build("separable")
    x = images()
    expected = 2 * layer(x)
    layer.pointwise = nn.Sequential(layer.pointwise, layers.PointwiseConv2d(OUTPUTS, OUTPUTS, bias=False))
    with torch.no_grad():
        layer.pointwise[1].weight.copy_(2 * torch.eye(OUTPUTS)[:, :, None, None])
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(TypeError, match=r"SeparableConv2d: pointwise: expected an nn\.Conv2d, found Sequential"):
        layer.cost(SIZE)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_layer_goes_through_torch_script_after_a_stage_was_replaced() -> None:
    layer, x = build("separable"), images()
    layer.pointwise = nn.Sequential(layer.pointwise)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
