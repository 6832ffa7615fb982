from typing import Any

import pytest
import torch
from layer_cases import build
from networks import relative
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.layers.dynamic import DynamicConv2d, _convolve_groups, _multiply_patches

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"groups": 4, "bias": False},
    {"groups": 8, "stride": 2},
    {"kernel_size": (2, 4), "stride": (1, 3), "padding_mode": "circular"},
    {"dilation": (2, 1), "padding_mode": "reflect", "groups": 2},
    {"padding": "valid", "dilation": 3, "padding_mode": "replicate"},
    {"padding": (0, 2), "kernel_size": 1},
]


def images(batch: int) -> Tensor:
    return torch.randn(batch, 8, 9, 12, dtype=torch.float64)


def reference(layer: DynamicConv2d, image: Tensor) -> Tensor:
    """The definition, for one example: torch's own convolution with its kernel."""
    shares = layer.attention(image)[0]
    spec = layer.spec
    conv = nn.Conv2d(
        8, 16, spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.groups, spec.bias, spec.padding_mode,
        dtype=torch.float64,
    )  # fmt: skip
    conv.weight.data = sum(share * kernel for share, kernel in zip(shares, layer.weight, strict=True))
    if layer.bias is not None:
        conv.bias.data = sum(share * bias for share, bias in zip(shares, layer.bias, strict=True))
    return conv(image)


@pytest.mark.parametrize("changes", [geometry for geometry in GEOMETRIES if geometry.get("kernel_size") != (2, 4)])
def test_an_example_is_convolved_with_the_mixture_its_attention_chooses(changes: dict[str, Any]) -> None:
    strided = {"padding": 1} if "stride" in changes else {}
    layer = build("dynamic", dtype=torch.float64, **changes, **strided)
    for image in images(3).split(1):
        torch.testing.assert_close(layer(image), reference(layer, image))


@pytest.mark.parametrize("changes", GEOMETRIES)
def test_a_batch_is_its_examples_one_by_one(changes: dict[str, Any]) -> None:
    layer = build("dynamic", dtype=torch.float64, **changes)
    for batch in (1, 2, 5):
        x = images(batch)
        torch.testing.assert_close(layer(x), torch.cat([layer(image) for image in x.split(1)]))


@pytest.mark.parametrize("changes", GEOMETRIES)
def test_an_example_without_a_batch_is_taken_as_torchs_own_layers_take_it(changes: dict[str, Any]) -> None:
    layer = build("dynamic", dtype=torch.float64, **changes)
    image = images(1)[0]
    torch.testing.assert_close(layer(image), layer(image[None])[0])
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(image), layer(image))


@pytest.mark.parametrize("changes", GEOMETRIES)
def test_the_exported_formulation_computes_the_same_numbers(changes: dict[str, Any]) -> None:
    layer: Any = build("dynamic", dtype=torch.float64, **{**changes, "padding": "valid"})
    x = images(3)
    arguments = (layer.attention(x), layer.weight, layer.bias, layer.stride, layer.dilation, layer.groups)
    torch.testing.assert_close(_multiply_patches(x, *arguments), _convolve_groups(x, *arguments))


def test_different_inputs_get_different_kernels() -> None:
    layer: Any = build("dynamic", dtype=torch.float64)
    x = images(4)
    kernels = layer.kernels_for(x)
    assert kernels.shape == (4, 16, 8, 3, 3)
    distances = torch.cdist(kernels.flatten(1), kernels.flatten(1)) + torch.eye(4)
    assert distances.min() > 1e-3
    torch.testing.assert_close(layer.attention(x).sum(1), torch.ones(4, dtype=torch.float64))
    # A kernel of the content: what matters is each channel's mean, not where in the image it comes from.
    torch.testing.assert_close(layer.kernels_for(x.flip(2)), kernels)


def test_the_temperature_evens_the_mixture_and_is_saved_with_the_weights() -> None:
    layer: Any = build("dynamic")
    x = images(2).float()
    sharp = layer.attention(x)
    layer.attention.temperature.fill_(1e4)
    even = layer.attention(x)
    torch.testing.assert_close(even, torch.full_like(even, 0.25), atol=1e-3, rtol=0)
    assert (sharp - even).abs().max() > 0.01
    other: Any = build("dynamic")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("changes", [{}, {"groups": 2, "stride": 2, "padding_mode": "circular"}])
def test_gradients_are_right(changes: dict[str, Any]) -> None:
    layer = DynamicConv2d(2, 2, 2, kernels=2, temperature=1.0, reduction=1, dtype=torch.float64, **changes)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_equal_kernels_give_the_convolution_and_noise_tells_them_apart() -> None:
    conv = nn.Conv2d(8, 16, (3, 2), 2, (1, 0), padding_mode="reflect", groups=2, dtype=torch.float64)
    x = images(3)
    layer = DynamicConv2d.from_conv(conv, kernels=3, temperature=0.1)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-13, atol=1e-13)
    noisy, again = (DynamicConv2d.from_conv(conv, kernels=3, noise=0.01, seed=7) for _ in range(2))
    assert torch.equal(noisy.weight, again.weight)
    assert not torch.equal(noisy.weight[0], noisy.weight[1])
    assert 1e-4 < relative(noisy(x).detach(), conv(x).detach()) < 0.03
    assert not torch.equal(noisy.weight, DynamicConv2d.from_conv(conv, kernels=3, noise=0.01, seed=8).weight)
    with pytest.raises(ValueError, match="noise: expected a finite number from 0, found -1"):
        DynamicConv2d.from_conv(conv, noise=-1)


def test_noise_is_what_gives_the_attention_a_gradient() -> None:
    conv = nn.Conv2d(8, 16, 3, dtype=torch.float64)
    slopes = []
    for noise in (0.0, 0.1):
        layer = DynamicConv2d.from_conv(conv, noise=noise)
        layer(images(2)).square().sum().backward()
        slopes.append(float(layer.attention.score.weight.grad.abs().max()))
    assert slopes[0] < 1e-9 < 1e-4 < slopes[1]


def test_a_kernel_per_example_cannot_simply_be_handed_to_conv2d() -> None:
    # The widely copied snippet: a random five-dimensional weight, which depends on nothing, in F.conv2d.
    kernels = torch.randn(2, 16, 8, 3, 3)
    with pytest.raises(RuntimeError):
        F.conv2d(torch.randn(2, 8, 9, 12), kernels)
    layer: Any = build("dynamic")
    assert layer.kernels_for(torch.randn(2, 8, 9, 12)).shape == kernels.shape
    assert layer(torch.randn(2, 8, 9, 12)).shape == (2, 16, 9, 12)


def test_a_jit_trace_takes_any_batch() -> None:
    layer = build("dynamic", dtype=torch.float64)
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        traced = torch.jit.trace(layer, images(2))
    x = images(5)
    torch.testing.assert_close(traced(x), layer(x))
