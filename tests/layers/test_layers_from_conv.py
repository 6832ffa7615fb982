from typing import Any

import pytest
import torch
from layer_cases import build
from networks import natural, relative
from torch import Tensor, nn
from torch.nn.utils import prune

from convrewrite import layers
from convrewrite.conv import ConvSpec
from convrewrite.layers.asymmetric import AsymmetricConv2d
from convrewrite.layers.grouped import GroupedConv2d
from convrewrite.layers.separable import SeparableConv2d
from convrewrite.layers.transposed import TransposedConv2d

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": 2, "padding": (0, 2), "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "reflect"},
    {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "valid", "stride": (1, 3), "padding_mode": "replicate"},
]


def conv(inputs: int = 8, outputs: int = 12, **geometry: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, **{"kernel_size": 3, "dtype": torch.float64, **geometry})


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 8, 10, 13, dtype=torch.float64)


EXACT: dict[str, tuple[Any, dict[str, Any]]] = {
    "standard": (layers.StandardConv2d, {"padding": 1, "stride": 2}),
    "standard, even": (layers.StandardConv2d, {"padding": "same", "kernel_size": (2, 3), "padding_mode": "reflect"}),
    "standard, one axis": (layers.StandardConv2d, {"padding": (0, 1), "kernel_size": (1, 3), "bias": False}),
    "pointwise": (layers.PointwiseConv2d, {"kernel_size": 1, "stride": 2}),
    "pointwise, grouped": (layers.PointwiseConv2d, {"kernel_size": 1, "groups": 2, "padding": 1}),
    "dilated": (layers.DilatedConv2d, {"dilation": (2, 3), "padding": 2, "groups": 2, "padding_mode": "circular"}),
    "depthwise": (layers.DepthwiseConv2d, {"outputs": 16, "groups": 8, "bias": False}),
    "grouped": (layers.GroupedConv2d, {"groups": 4, "padding": (2, 0), "padding_mode": "replicate"}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", EXACT)
def test_a_convolution_of_the_kind_is_copied_exactly(name: str) -> None:
    kind, geometry = EXACT[name]
    source = conv(**geometry).eval()
    layer = kind.from_conv(source)
    x = images()
    torch.testing.assert_close(layer(x), source(x), rtol=1e-12, atol=1e-12)
    assert not layer.training
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    with torch.no_grad():
        source.weight.zero_()
    assert all(parameter.any() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        (layers.StandardConv2d, conv(groups=4), "groups: expected 1, found 4; use GroupedConv2d"),
        (layers.StandardConv2d, conv(kernel_size=1), "use PointwiseConv2d"),
        (layers.StandardConv2d, conv(dilation=2), "use DilatedConv2d"),
        (layers.PointwiseConv2d, conv(), r"kernel_size: expected \(1, 1\), found \(3, 3\)"),
        (layers.DilatedConv2d, conv(), "dilation: expected more than 1.*use StandardConv2d"),
        (layers.DepthwiseConv2d, conv(groups=4), "groups: expected in_channels=8, found 4; use GroupedConv2d"),
        (layers.DepthwiseConv2d, conv(), "groups: expected in_channels=8, found 1; use SeparableConv2d"),
        (layers.GroupedConv2d, conv(outputs=16, groups=8), "groups: expected less than in_channels=8"),
        (layers.SeparableConv2d, conv(kernel_size=1), "a 1x1 kernel has no spatial extent"),
        (layers.AsymmetricConv2d, conv(kernel_size=(3, 1)), "no second axis"),
        (layers.SeparableConv2d, nn.ConvTranspose2d(8, 8, 3), "found an nn.ConvTranspose2d; TransposedConv2d takes"),
        (layers.DynamicConv2d, nn.Linear(8, 8), "expected an nn.Conv2d, found Linear"),
        (layers.TransposedConv2d, conv(), "expected an nn.ConvTranspose2d, found Conv2d"),
    ],
)
def test_a_convolution_of_another_kind_is_refused(kind: Any, source: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: .*{words}"):
        kind.from_conv(source)


def test_a_subclass_with_a_forward_of_its_own_is_refused() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match="found Doubled, which has its own forward"):
        layers.StandardConv2d.from_conv(Doubled(8, 8, 3))
    patched = conv()
    patched.forward = patched.forward
    with pytest.raises(ValueError, match="found Conv2d, which has its own forward"):
        layers.StandardConv2d.from_conv(patched)


def test_a_subclass_that_changes_nothing_is_taken() -> None:
    class Named(layers.TransposedConv2d):
        pass

    x = images()
    source: Any = Named(8, 8, 4, stride=1, dtype=torch.float64)
    assert torch.equal(layers.TransposedConv2d.from_conv(source)(x), source(x))
    normed = nn.utils.parametrizations.weight_norm(layers.StandardConv2d(8, 8, dtype=torch.float64))
    assert torch.equal(layers.StandardConv2d.from_conv(normed)(x), normed(x))


def test_a_convolution_is_neither_called_nor_changed() -> None:
    source, x = nn.utils.parametrizations.spectral_norm(conv(2, 3)), natural(3, 2, 6, 6)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    called: list[nn.Module] = []
    source.register_forward_hook(lambda module, _args, _output: called.append(module))
    layer, fitted = layers.StandardConv2d.from_conv(source), SeparableConv2d.from_conv(source, inputs=x)
    assert fitted.training and source.training and not called
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert torch.equal(layer(x), source.eval()(x))


def test_numbers_that_may_be_out_of_date_are_refused() -> None:
    trained, pruned, cut = conv(), conv(), conv()
    for one in (trained, pruned):
        prune.l1_unstructured(one, "weight", 0.3)
    pruned.load_state_dict(trained.state_dict())  # its weight is still that of before
    with pytest.raises(ValueError, match=r"weight: expected numbers that stay, .*prune\.remove"):
        SeparableConv2d.from_conv(pruned)
    cut.weight = nn.Parameter(cut.weight.detach()[:, :1])
    with pytest.raises(ValueError, match=r"weight: expected \(12, 8, 3, 3\) by its attributes, found \(12, 1, 3, 3\)"):
        layers.DynamicConv2d.from_conv(cut)
    lazy: Any = nn.LazyConv2d(8, 3)
    with pytest.raises(ValueError, match="weight: expected numbers, found none yet; call the convolution once"):
        layers.StandardConv2d.from_conv(lazy)


def test_a_layer_is_itself_a_convolution_to_start_from() -> None:
    source = layers.StandardConv2d(8, 12, 4, stride=2, padding_mode="reflect", dtype=torch.float64)
    layer = SeparableConv2d.from_conv(source, multiplier=12)
    x = images()
    torch.testing.assert_close(layer(x), source(x))
    assert layer(x).shape[2:] == (5, 7)


FULL_RANK: dict[str, Any] = {
    "depthwise first": lambda c, s, i: SeparableConv2d.from_conv(
        c, multiplier=min(s.out_channels, s.kernel_size[0] * s.kernel_size[1]), inputs=i
    ),
    "pointwise first": lambda c, s, i: SeparableConv2d.from_conv(
        c, multiplier=min(s.in_channels, s.kernel_size[0] * s.kernel_size[1]), order="pointwise-first", inputs=i
    ),
    "vertical first": lambda c, s, i: AsymmetricConv2d.from_conv(
        c, rank=min(s.in_channels * s.kernel_size[0], s.out_channels * s.kernel_size[1]), inputs=i
    ),
    "horizontal first": lambda c, s, i: AsymmetricConv2d.from_conv(
        c, rank=min(s.in_channels * s.kernel_size[1], s.out_channels * s.kernel_size[0]), order="horizontal-first",
        inputs=i,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", FULL_RANK)
@pytest.mark.parametrize("geometry", [*GEOMETRIES, {"padding": 1, "groups": 2}])
def test_full_rank_is_the_convolution_itself(name: str, geometry: dict[str, Any]) -> None:
    source = conv(**geometry)
    layer = FULL_RANK[name](source, ConvSpec.of(source).per_group, None)
    x = images()
    torch.testing.assert_close(layer(x), source(x), rtol=1e-10, atol=1e-10)
    assert (layer.stages[-1].bias is None) == (source.bias is None)
    assert all(stage.bias is None for stage in layer.stages[:-1])
    with pytest.raises(ValueError, match="which reproduces this convolution exactly"):
        FULL_RANK[name](source, ConvSpec(99, 99, (9, 9)), None)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_full_rank_grouped_layer_is_the_convolution_itself(geometry: dict[str, Any]) -> None:
    source = conv(**geometry)
    area = source.kernel_size[0] * source.kernel_size[1]
    layer = GroupedConv2d.from_conv(source, groups=2, rank=min(12, 4 * area))
    x = images()
    torch.testing.assert_close(layer(x), source(x), rtol=1e-10, atol=1e-10)
    assert GroupedConv2d.from_conv(source).groups == 4
    with pytest.raises(ValueError, match="rank: expected 1 to 12"):
        GroupedConv2d.from_conv(source, groups=2, rank=13)


def test_a_grouped_convolution_is_copied_without_any_change() -> None:
    source = conv(groups=4)
    with pytest.raises(ValueError, match="a convolution in 4 groups is copied as it is"):
        GroupedConv2d.from_conv(source, groups=2)
    assert not GroupedConv2d.from_conv(source, groups=4).mix


@pytest.mark.parametrize("name", ["depthwise first", "vertical first"])
@pytest.mark.parametrize("bias", [True, False])
def test_fitted_at_full_rank_it_is_still_the_convolution(name: str, bias: bool) -> None:
    source = conv(4, 5, padding=1, bias=bias)
    x = natural(6, 4, 12, 12)
    layer = FULL_RANK[name](source, ConvSpec.of(source), x)
    assert relative(layer(x).detach(), source(x).detach()) < 1e-3


@pytest.mark.parametrize(
    ("make", "geometry"),
    [
        (lambda c, i: SeparableConv2d.from_conv(c, inputs=i), {"bias": False}),
        (lambda c, i: SeparableConv2d.from_conv(c, inputs=i), {"stride": 2, "groups": 2}),
        (lambda c, i: SeparableConv2d.from_conv(c, order="pointwise-first", inputs=i), {"groups": 2}),
        (lambda c, i: AsymmetricConv2d.from_conv(c, rank=2, inputs=i), {"dtype": torch.float32}),
        (lambda c, i: GroupedConv2d.from_conv(c, groups=2, rank=2, inputs=i), {}),
    ],
    ids=["depthwise first", "strided, in groups", "pointwise first", "asymmetric", "grouped"],
)
def test_fitting_on_real_inputs_lowers_the_error_on_new_ones(make: Any, geometry: dict[str, Any]) -> None:
    source = conv(4, 6, padding=1, **geometry)
    known, new = natural(14, 4, 12, 12, source.weight.dtype).split([10, 4])
    plain, fitted = make(source, None), make(source, known)
    before, after = (relative(layer(new).detach(), source(new).detach()) for layer in (plain, fitted))
    assert after < 0.8 * before
    assert next(fitted.parameters()).dtype == source.weight.dtype
    assert all(parameter.requires_grad for parameter in fitted.parameters())


def test_without_a_bias_the_mean_of_the_output_is_fitted_too() -> None:
    source = conv(4, 6, padding=1, bias=False)
    x = natural(10, 4, 12, 12) + 3
    fitted = SeparableConv2d.from_conv(source, inputs=x)
    shift = (fitted(x) - source(x)).mean((0, 2, 3)).detach()
    assert relative(source(x).mean((0, 2, 3)).detach() + shift, source(x).mean((0, 2, 3)).detach()) < 0.02


def test_inputs_may_come_in_batches_of_any_size() -> None:
    source = conv(4, 4, padding=1, dtype=torch.float32)
    x = natural(7, 4, 9, 9, torch.float32)
    whole = SeparableConv2d.from_conv(source, inputs=x)
    parts = SeparableConv2d.from_conv(source, inputs=iter(x.split([3, 0, 4])))
    torch.testing.assert_close(parts(x), whole(x), rtol=1e-2, atol=1e-2)
    mixed = SeparableConv2d.from_conv(source, inputs=[x[:3], x[3:, :, :7, :6]])
    single, few = (SeparableConv2d.from_conv(source, inputs=x[:count]) for count in (1, 3))
    assert all(parameter.isfinite().all() for layer in (mixed, single, few) for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.randn(2, 7, 9, 9), r"expected batches \(N, 8, H, W\).* found torch.float32 \(2, 7, 9, 9\)"),
        (torch.randn(8, 9, 9), r"found torch.float32 \(8, 9, 9\)"),
        (torch.zeros(2, 8, 9, 9, dtype=torch.uint8), "found torch.uint8"),
        ([], "found none"),
        ([9], "found int"),
        (5, "found int"),
        (torch.randn(2, 8, 1, 9), "found 1x9"),
        (torch.full((2, 8, 9, 9), torch.nan), "found NaN or infinity"),
        ([torch.randn(0, 8, 9, 9)], "found none"),
    ],
)
def test_inputs_of_another_convolution_are_refused(inputs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"SeparableConv2d: inputs: .*{words}"):
        SeparableConv2d.from_conv(conv(), inputs=inputs)


@torch.no_grad()
def test_numbers_that_nothing_can_be_fitted_to_are_refused() -> None:
    x, undefined = images(3), conv()
    undefined.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="SeparableConv2d: weight: expected finite numbers"):
        SeparableConv2d.from_conv(undefined)
    with pytest.raises(ValueError, match=r"SeparableConv2d: weight: expected real .* found torch\.complex64"):
        SeparableConv2d.from_conv(conv(dtype=torch.complex64))
    with pytest.raises(ValueError, match="expected weights and inputs of ordinary size"):
        SeparableConv2d.from_conv(conv(dtype=torch.float32), inputs=x.float() * 1e25)
    with pytest.raises(ValueError, match="planes that its padding can be taken from, found 3x3"):
        SeparableConv2d.from_conv(conv(kernel_size=7, padding=3, padding_mode="reflect"), inputs=x[:, :, :3, :3])


def test_the_callers_mode_and_default_device_change_nothing() -> None:
    source, x = conv(), images(3)
    plain = AsymmetricConv2d.from_conv(source, inputs=x)
    with torch.inference_mode(), torch.device("meta"):
        found = AsymmetricConv2d.from_conv(source, inputs=x.clone())
        noisy = layers.DynamicConv2d.from_conv(source, noise=0.1)
    assert torch.equal(found.vertical.weight, plain.vertical.weight)
    assert torch.equal(noisy.weight, layers.DynamicConv2d.from_conv(source, noise=0.1).weight)


def test_a_grouped_layer_has_no_more_filters_than_are_exact_unless_told() -> None:
    source = conv(outputs=64, kernel_size=1)
    layer, x = GroupedConv2d.from_conv(source), images()
    assert (layer.groups, layer.rank) == (4, 2)
    assert relative(layer(x), source(x)) < 1e-10


@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": (1, 3), "padding": (2, 0), "dilation": (2, 1), "groups": 2, "bias": False},
        {"kernel_size": (4, 2), "stride": 2, "groups": 4},
    ],
)
def test_a_transposed_convolution_is_copied_exactly(geometry: dict[str, Any]) -> None:
    source = nn.ConvTranspose2d(8, 12, **{"kernel_size": 3, "dtype": torch.float64, **geometry})
    layer = TransposedConv2d.from_conv(source)
    x = images()
    assert torch.equal(layer(x), source(x))
    assert layer.output_padding == source.output_padding
    again: Any = build("transposed", kernel_size=2, stride=1, dtype=torch.float64)
    assert torch.equal(TransposedConv2d.from_conv(again)(x), again(x))
    assert "cropped=(1, 1)" in repr(again)
