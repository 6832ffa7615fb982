"""Surgery: what is built, what is replaced, and what stays as it was."""

import io

import pytest
import torch
from networks import SPECS, CalledTwice, Chain, Residual, TwoNames, relative, settled, state_bytes
from torch import Tensor, nn

from convrewrite.conv import ConvSpec, canonical_kernel, classify
from convrewrite.errors import TraceError
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.layers.branches import SumOfBranches
from convrewrite.layers.dynamic import DynamicConv2d
from convrewrite.modules.copying import copy_model
from convrewrite.rewriting.surgery import build_conv, build_option, empty_option, folded_kernel, replace_site
from convrewrite.structures.algebra import initial_kernels
from convrewrite.structures.discovery import discover
from convrewrite.structures.lowering import make_option
from convrewrite.tuning.trainable import rewritten_parameters

named_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def example(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 12, 12).to(dtype)


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    dtype = next(model.parameters()).dtype
    return find_sites(model, (torch.zeros(1, 3, 12, 12, dtype=dtype),), trace(model))


def exact(model: nn.Module, site: Site, structure: str = "channel", rank: int | None = None) -> nn.Module:
    """What a site becomes at full rank, or at the rank given."""
    family = discover()[structure]
    kernel, bias = folded_kernel(model, site)
    spec = site.folded_spec
    variant = family.variants(spec.per_group)[0]
    setting = {**variant, "rank": rank or family.full_rank(spec.per_group, variant)}
    kernels, stages = initial_kernels(family, kernel, spec, setting), family.stages(spec.per_group, setting)
    like = model.get_submodule(site.name).weight
    assert isinstance(like, Tensor)
    return build_option(spec, stages, make_option(family, spec, setting), kernels, bias, like)


def rewritten(model: nn.Module, structure: str = "channel", rank: int | None = None) -> nn.Module:
    """A copy with every site replaced."""
    copy = copy_model(model)
    for site in sites_of(model):
        replace_site(copy, site, exact(model, site, structure, rank))
    return copy


@pytest.mark.parametrize("model", [Chain(), Residual(), CalledTwice(), TwoNames()], ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_a_rewritten_copy_computes_the_same_and_the_original_is_untouched(model: nn.Module) -> None:
    settled(model.double())
    x, before = example(), state_bytes(model)
    expected = model(x)
    found = rewritten(model)
    assert type(found) is type(model)
    assert relative(found(x), expected) < 1e-12
    assert state_bytes(model) == before
    assert torch.equal(model(x), expected)


def test_other_keys_of_the_state_dict_stay_as_they_were() -> None:
    model = settled(Residual())
    found = rewritten(model)
    convs = {site.name for site in sites_of(model)} | {str(site.batch_norm) for site in sites_of(model)}
    kept = [key for key in model.state_dict() if key.rpartition(".")[0] not in convs]
    assert kept == ["head.weight", "head.bias"]
    assert all(torch.equal(found.state_dict()[key], model.state_dict()[key]) for key in kept)
    new = [key for key in found.state_dict() if key not in kept]
    assert all(any(key.startswith(f"{name}.") for name in convs) for key in new)


@named_specs
@torch.no_grad()
def test_folding_batch_norm_is_exact(spec: ConvSpec) -> None:
    model = settled(nn.Sequential(spec.build(), nn.BatchNorm2d(spec.out_channels)).double())
    site = Site("0", classify(spec), spec, ((9, 9),), batch_norm="1")
    kernel, bias = folded_kernel(model, site)
    x = torch.randn(2, spec.in_channels, 9, 9, dtype=torch.float64)
    assert kernel.dtype == bias.dtype == torch.float64
    assert relative(build_conv(site.folded_spec, kernel, bias, x)(x), model(x)) < 1e-12


@torch.no_grad()
def test_folding_batch_norm_without_weights_is_exact() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False, eps=0.1)).double())
    (site,) = sites_of(model)
    kernel, bias = folded_kernel(model, site)
    x = example()
    assert relative(build_conv(site.folded_spec, kernel, bias, x)(x), model(x)) < 1e-12


@named_specs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_built_convolution_has_kernel_bias_and_dtype(spec: ConvSpec, dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)
    kernel, bias = torch.randn(spec.kernel_shape).to(dtype), torch.randn(spec.out_channels).to(dtype)
    module = build_conv(spec, kernel.double(), bias.double() if spec.bias else None, like)
    assert torch.equal(canonical_kernel(module.weight, spec), kernel)
    assert module.bias is None or torch.equal(module.bias, bias)
    assert (module.weight.dtype, module.training) == (dtype, False)


def test_a_bias_that_the_geometry_asks_for_must_be_given() -> None:
    spec = ConvSpec(2, 2, (1, 1))
    with pytest.raises(AssertionError, match="asks for a bias"):
        build_conv(spec, torch.zeros(spec.kernel_shape), None, torch.zeros(1))


def test_an_empty_option_takes_the_state_of_a_built_one() -> None:
    spec, family = ConvSpec(4, 6, (3, 3), padding=(1, 1)), discover()["separable"]
    x = torch.randn(1, 4, 5, 5)
    for rank, kind in ((1, nn.Sequential), (2, SumOfBranches)):
        setting = {"order": "depthwise-first", "rank": rank}
        stages, option = family.stages(spec, setting), make_option(family, spec, setting)
        kernels = initial_kernels(family, torch.randn(spec.kernel_shape), spec, setting)
        built = build_option(spec, stages, option, kernels, torch.randn(6), x)
        empty = empty_option(spec, stages, option, x)
        empty.load_state_dict(built.state_dict())
        assert type(built) is type(empty) is kind
        assert torch.equal(empty(x), built(x))


def test_a_module_under_two_names_is_replaced_in_both_places() -> None:
    model = settled(TwoNames())
    found = rewritten(model)
    assert found.encoder.conv is found.alias
    assert isinstance(found.alias, nn.Sequential)
    assert model.encoder.conv is model.alias
    assert isinstance(model.alias, nn.Conv2d)


@torch.no_grad()
def test_a_rewritten_model_can_be_pickled_with_its_weights() -> None:
    model = rewritten(settled(Chain()), "separable", rank=2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = example(torch.float32)
    assert torch.equal(loaded(x), model(x))


def test_what_was_trainable_is_trainable_and_what_was_frozen_is_frozen() -> None:
    model = settled(Chain())
    model[3].requires_grad_(False)
    found = rewritten(model)
    assert all(p.requires_grad for p in found[0].parameters())
    assert not any(p.requires_grad for p in found[3].parameters())
    found(example(torch.float32)).sum().backward()
    assert all(p.grad is not None for p in found[0].parameters())


class OneAttention(nn.Module):
    """Two dynamic convolutions with one attention, which is frozen, as their biases are, and held under a third name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DynamicConv2d(3, 3), DynamicConv2d(3, 3)
        self.attention = self.second.attention = self.first.attention
        for part in (self.attention, self.first.bias, self.second.bias):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def test_the_attention_of_dynamic_convolutions_stays_one_and_is_trained_by_nothing_here() -> None:
    found = rewritten(settled(OneAttention()))
    assert found.first.attention is found.second.attention is found.attention
    trained = {name for name, p in found.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in ("first", "second") for part in ("features.0.weight", "weight")}
    refined = {"features.0.weight", "weight", "bias"}
    assert rewritten_parameters(found, ["first", "second"]).keys() == {
        f"{n}.{p}" for n in ("first", "second") for p in refined
    }


def test_every_module_of_the_copy_is_in_eval_mode() -> None:
    model = Chain().train()
    found = copy_model(model)
    assert model.training
    found = rewritten(settled(Chain()))
    assert [name for name, m in found.named_modules() if m.training] == []


def test_parameters_are_the_copys_own() -> None:
    model = settled(Residual())
    found = rewritten(model)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in ours for p in found.parameters())


def test_a_model_that_cannot_be_copied_is_a_trace_error() -> None:
    model = Chain()
    model.lock = (i for i in range(3))
    with pytest.raises(TraceError, match="Chain: the model cannot be copied"):
        copy_model(model)
