"""Static first stages under a last one that stays a mixture: the same numbers, fewer of them, and onnxruntime's parity."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import macs_by_hooks, relative
from torch import Tensor, nn

from convrewrite.conv import Cost, Kind
from convrewrite.graph.sites import Site
from convrewrite.layers.dynamic import DynamicConv2d, stack, unstack
from convrewrite.layers.dynamic_chain import DynamicChain
from convrewrite.meanings.kinds import tell
from convrewrite.rewriting.output_weighting import output_weights
from convrewrite.rewriting.surgery import build_option, folded_kernel, in_place_of
from convrewrite.rules.options import allowed_variants
from convrewrite.runtime.onnx_export import export
from convrewrite.runtime.parity import check_parity, require_parity
from convrewrite.structures.algebra import initial_kernels
from convrewrite.structures.discovery import discover
from convrewrite.structures.lowering import lowerings, make_option, option_cost, stage_specs
from convrewrite.structures.structure import Option, Structure

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"groups": 2, "bias": False},
    "strided": {"stride": 2, "kernel_size": (3, 5), "padding_mode": "reflect"},
    "dilated": {"dilation": (2, 1), "padding": "valid", "kernels": 2},
}
STRUCTURES = ["separable", "asymmetric", "grouped", "channel", "tucker", "cp"]


def dynamic(dtype: torch.dtype = torch.float64, **changes: Any) -> DynamicConv2d:
    """From 8 to 12 channels, with an attention that is far from even."""
    settings = {"kernels": 3, "temperature": 0.5} | changes
    layer = DynamicConv2d(8, 12, dtype=dtype, **settings).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    return layer


def images(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 8, 10, 9, dtype=dtype) + torch.randn(batch, 8, 1, 1, dtype=dtype)


def options(structure: Structure, layer: DynamicConv2d, rank: int | None = None) -> list[Option]:
    """Every variant in every lowering, at full rank unless a rank is given."""
    spec = layer.stacked_spec
    settings = [
        {**v, "rank": rank or structure.full_rank(spec.per_group, v)} for v in allowed_variants(structure, spec, {})
    ]
    return [
        replace(make_option(structure, spec, setting), lowering=lowering)
        for setting in settings
        for lowering in lowerings(structure.stages(spec.per_group, setting))
    ]


def rewritten(layer: DynamicConv2d, structure: Structure, option: Option) -> DynamicChain:
    """The layer with its kernels decomposed by their weights alone."""
    model, spec = nn.Sequential(layer), layer.stacked_spec
    kernel, bias = folded_kernel(model, Site("0", Kind.DYNAMIC, spec, ()))
    kernels = initial_kernels(structure, kernel, spec, option.parameters)
    stages = structure.stages(spec.per_group, option.parameters)
    made = in_place_of(layer, build_option(spec, stages, option, kernels, bias, layer.weight))
    assert isinstance(made, DynamicChain)
    return made


def test_stacking_keeps_the_kernels_of_a_group_together() -> None:
    numbers = torch.arange(12).reshape(3, 4)  # three kernels of four outputs
    assert stack(numbers, 1).tolist() == list(range(12))
    assert stack(numbers, 2).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert torch.equal(unstack(stack(numbers, 2), 3, 2), numbers)


@pytest.mark.parametrize("changes", GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_the_stacked_kernels_are_one_static_convolution_that_is_then_mixed(changes: dict[str, Any]) -> None:
    layer, x = dynamic(**changes), images(4)
    spec = layer.stacked_spec
    conv = spec.build(torch.float64)
    conv.weight.copy_(stack(layer.weight, layer.groups))
    if conv.bias is not None and layer.bias is not None:
        conv.bias.copy_(stack(layer.bias, layer.groups))
    each = unstack(conv(x).transpose(0, 1), layer.kernels, layer.groups)  # (K, O, N, H, W)
    mixed = torch.einsum("nk,konhw->nohw", layer.attention(x), each)
    torch.testing.assert_close(mixed, layer(x))


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("changes", GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_at_full_rank_the_outputs_are_the_originals(changes: dict[str, Any], name: str) -> None:
    structure, layer, x = discover()[name], dynamic(**changes), images(3)
    found = options(structure, layer)
    assert found
    for option in found:
        chain = rewritten(layer, structure, option)
        # cp reaches its rank by alternating least squares, which ends near the exact kernel
        assert relative(chain(x), layer(x)) < (1e-3 if name == "cp" else 1e-10), option.describe()
        assert torch.equal(chain.attention(x), layer.attention(x))


@torch.no_grad()
def test_a_single_kernel_becomes_a_static_chain_of_any_kind() -> None:
    structure, layer, x = discover()["separable"], dynamic(kernels=1), images(3)
    spec = layer.stacked_spec
    kernel, bias = folded_kernel(nn.Sequential(layer), Site("0", Kind.DYNAMIC, spec, ()))
    for option in options(structure, layer):
        kernels = initial_kernels(structure, kernel, spec, option.parameters)
        stages = structure.stages(spec, option.parameters)
        made = in_place_of(layer, build_option(spec, stages, option, kernels, bias, layer.weight))
        assert relative(made(x), layer(x)) < 1e-10, option.describe()


def test_a_last_stage_that_does_not_mix_is_no_variant() -> None:
    spec = dynamic().stacked_spec
    orders = [variant["order"] for variant in allowed_variants(discover()["separable"], spec, {})]
    assert orders == ["depthwise-first"]


@pytest.mark.parametrize("name", STRUCTURES)
def test_costs_are_those_of_what_is_built(name: str) -> None:
    structure, layer = discover()[name], dynamic()
    spec = layer.stacked_spec
    attention = sum(parameter.numel() for parameter in layer.attention.parameters())
    for option in options(structure, layer, rank=2):
        chain = rewritten(layer, structure, option)
        stages = structure.stages(spec, option.parameters)
        cost = option_cost(spec, stages, [(10, 9)], option.lowering)
        assert cost.parameters == sum(parameter.numel() for parameter in chain.parameters()) - attention
        mixed = chain.weight.numel() + 12 * 3
        last = chain.spec.output_size((10, 9))
        once = last[0] * last[1] * chain.weight[0].numel()
        assert cost.macs == macs_by_hooks(chain, images(1)) + mixed + once, option.describe()
        assert cost.parameters < spec.parameters
        assert cost.macs < spec.macs((10, 9))


def test_the_original_costs_one_convolution_and_the_mixing() -> None:
    layer = dynamic()
    attention = layer.cost((10, 9)) + Cost(-layer.weight.numel() - 36, -layer.weight.numel() - 36 - 90 * 12 * 8 * 9)
    assert layer.stacked_spec.cost([(10, 9)]) + attention == layer.cost((10, 9))
    assert attention.parameters == sum(parameter.numel() for parameter in layer.attention.parameters())
    assert layer.stacked_spec.describe() == "8->12 3x3 p1 3 kernels"
    specs = stage_specs(layer.stacked_spec, discover()["channel"].stages(layer.stacked_spec, {"rank": 4}))
    assert [spec.kernels for spec in specs] == [1, 3]


@pytest.mark.parametrize(("name", "rank"), [("separable", 2), ("asymmetric", 3), ("channel", 4)])
def test_onnxruntime_gives_the_same_for_every_batch(name: str, rank: int, tmp_path: Path) -> None:
    layer = dynamic(torch.float32, groups=2)
    for option in options(discover()[name], layer, rank):
        model = nn.Sequential(nn.Conv2d(8, 8, 1), rewritten(layer, discover()[name], option)).eval()
        exported = export(model, images(2, torch.float32), tmp_path / "m.onnx")
        assert exported.dynamic_batch
        for batch in (1, 5):
            require_parity(check_parity(model, exported.path, (images(batch, torch.float32),)))


def test_a_chain_trains_pickles_and_shows_what_it_is() -> None:
    layer = dynamic().train()
    chain = rewritten(layer, discover()["separable"], options(discover()["separable"], layer, 2)[0])
    assert chain.training
    chain(images(2)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())
    assert not {p.data_ptr() for p in chain.parameters()} & {p.data_ptr() for p in layer.parameters()}
    file = io.BytesIO()
    torch.save(chain, file)
    file.seek(0)
    x = images(2)
    assert torch.equal(torch.load(file, weights_only=False)(x), chain(x))
    assert "kernels=3, bias=True" in repr(chain)


def test_a_chain_takes_one_example_without_a_batch() -> None:
    layer, structure = dynamic(), discover()["separable"]
    for option in options(structure, layer):
        made = rewritten(layer, structure, option)
        image = images(1)[0]
        torch.testing.assert_close(made(image), made(image[None])[0])


def test_a_chain_can_be_followed_by_torch_fx() -> None:
    layer, structure = dynamic(), discover()["separable"]
    made = rewritten(layer, structure, options(structure, layer)[0])
    traced = torch.fx.symbolic_trace(nn.Sequential(made, nn.ReLU()))
    for x in (images(1), images(3), images(1)[0]):
        assert torch.equal(traced(x), made(x).relu())


def test_anything_but_chains_of_convolutions_is_refused() -> None:
    with pytest.raises(TypeError, match="expected chains of convolutions, found ReLU"):
        DynamicChain.of(dynamic(), nn.ReLU())


def test_the_gradient_at_the_kernels_is_that_at_the_output_times_their_shares() -> None:
    layer, x = dynamic(groups=2), images(3)
    y = layer(x)
    gradient = torch.randn_like(y)
    each = layer.stacked_gradient(gradient, x)
    assert each.shape == (3, 36, 10, 9)
    shares = layer.attention(x)
    torch.testing.assert_close(unstack(each.transpose(0, 1), 3, 2).sum(0).transpose(0, 1), gradient)
    torch.testing.assert_close(each[0, :6], gradient[0, :6] * shares[0, 0])


def test_kernels_that_the_attention_passes_over_count_less() -> None:
    layer = dynamic(torch.float32, kernels=2)
    with torch.no_grad():
        layer.attention.score.weight.zero_()
        layer.attention.score.bias.copy_(torch.tensor([1.0, 0.0]))
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    site, batches = Site("0", Kind.DYNAMIC, layer.stacked_spec, ((10, 9),)), [(images(20, torch.float32),)]
    weights = output_weights(model, [site], batches, seed=0, meanings=tell(model, batches))["0"]
    assert weights.shape == (24, 24)
    assert weights.diagonal()[:12].mean() > 2 * weights.diagonal()[12:].mean()
