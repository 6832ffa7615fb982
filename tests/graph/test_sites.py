"""Finding every convolution of a model, what it is, and why some may not be touched."""

from collections.abc import Callable

import pytest
import torch
from networks import Block, Branching, CalledTwice, Calls, Chain, NineKinds, Residual, TwoNames, settled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from convrewrite.conv import ConvSpec, Cost, Kind
from convrewrite.errors import TraceError
from convrewrite.graph.calls import OTHER_WEIGHTS
from convrewrite.graph.sites import COMPUTED, Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.layers.dynamic import DynamicConv2d
from convrewrite.layers.single import StandardConv2d

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def sites_of(model: nn.Module, x: Tensor = X) -> dict[str, Site]:
    """The sites of a model, by name; whatever it finds, no hook stays behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    found = find_sites(model, (x,), trace(model))
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert len({site.name for site in found}) == len(found)
    return {site.name: site for site in found}


def conv(inputs: int = 3, outputs: int = 3, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


# --- kinds


def test_all_nine_kinds_in_one_model() -> None:
    sites = sites_of(settled(NineKinds()))
    kinds = {name: site.kind for name, site in sites.items()}
    assert kinds == {
        "standard": Kind.STANDARD,
        "pointwise": Kind.POINTWISE,
        "asymmetric": Kind.ASYMMETRIC,
        "dilated": Kind.DILATED,
        "depthwise": Kind.DEPTHWISE,
        "grouped": Kind.GROUPED,
        "separable_dw": Kind.SEPARABLE,
        "separable_pw": Kind.SEPARABLE,
        "transposed": Kind.TRANSPOSED,
        "#0": Kind.DYNAMIC,
    }
    assert set(kinds.values()) == set(Kind)
    assert [name for name, site in sites.items() if site.refusal] == ["#0"]
    assert sites["#0"].refusal == "the kernel is computed from the input"
    assert [name for name, site in sites.items() if site.is_stem] == ["standard"]


@pytest.mark.parametrize(
    ("between", "separable"),
    [(nn.Identity(), False), (nn.BatchNorm2d(4), True), (nn.ReLU(), False)],
    ids=lambda value: type(value).__name__,
)
def test_separable_means_directly_followed(between: nn.Module, separable: bool) -> None:
    depthwise, pointwise = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)
    sites = sites_of(settled(nn.Sequential(conv(3, 4), depthwise, between, pointwise)))
    expected = [Kind.SEPARABLE] * 2 if separable else [Kind.DEPTHWISE, Kind.POINTWISE]
    assert [sites["1"].kind, sites["3"].kind] == expected


# --- places


def test_a_convolution_called_twice_is_one_site() -> None:
    site = sites_of(settled(CalledTwice()))["shared"]
    assert site.input_sizes == ((12, 12), (6, 6))
    assert site.cost == Cost(8 * 8 * 9 + 8, 8 * 8 * 9 * (144 + 36))
    assert site.refusal is None


def test_a_module_under_two_names_is_one_site() -> None:
    sites = sites_of(settled(TwoNames()))
    assert list(sites) == ["first", "encoder.conv", "last"]
    assert sites["encoder.conv"].refusal is None


def test_a_block_called_twice_has_sites_with_two_calls() -> None:
    model = settled(Calls(lambda m, x: m.block(m.block(m.stem(x))), stem=conv(3, 8), block=Block(8, 8)))
    assert {name: len(site.input_sizes) for name, site in sites_of(model).items()} == {
        "stem": 1, "block.conv1": 2, "block.conv2": 2,
    }  # fmt: skip


def test_a_convolution_on_more_examples_than_the_batch_counts_them() -> None:
    """Frames or crops folded into the batch are calls of one example."""
    model = Calls(lambda m, x: m.conv(torch.cat([x, x, x])), conv=conv())
    assert sites_of(model)["conv"].input_sizes == ((12, 12),) * 3


def test_macs_are_those_of_one_example_however_the_examples_come() -> None:
    """One by one, or as halves of a batch: X has two examples."""
    ways: list[Callable[[Calls, Tensor], Tensor]] = [
        lambda m, x: m.conv(x),
        lambda m, x: torch.stack([m.conv(one) for one in x]),
        lambda m, x: torch.cat([m.conv(one) for one in x.split(1)]),
        lambda m, x: torch.vmap(m.conv)(x),
        lambda m, x: m.conv(x[:0]),
    ]
    sites = [sites_of(Calls(way, conv=conv()))["conv"] for way in ways]
    assert [(site.calls, site.cost.macs // (3 * 3 * 9)) for site in sites] == [(1, 144)] * 4 + [(1, 0)]
    assert [site.refusal is None for site in sites] == [True, False, False, False, False]


def test_a_transposed_convolution_that_is_told_its_output_size_stays() -> None:
    model = Calls(lambda m, x: m.up(x, output_size=(24, 24)), up=nn.ConvTranspose2d(3, 4, 3, 2, 1))
    assert "with an output_size" in str(sites_of(model)["up"].refusal)


def test_a_convolution_never_called_comes_last_with_a_reason() -> None:
    model = Calls(lambda m, x: m.used(x), unused=conv(), used=conv())
    sites = sites_of(model)
    assert list(sites) == ["used", "unused"]
    assert sites["unused"].refusal == "a run on the example input never calls it"
    assert sites["unused"].cost == Cost(3 * 3 * 9 + 3, 0)
    assert sites["used"].is_stem and not sites["unused"].is_stem


def test_a_model_that_cannot_be_traced_still_gives_its_sites() -> None:
    sites = sites_of(settled(Branching()))
    assert list(sites) == ["stem.0", "block.conv1", "block.conv2", "last"]
    assert all(site.refusal is None for site in sites.values())
    assert [site.batch_norm for site in sites.values()] == ["stem.1", "block.bn1", "block.bn2", None]


def test_sites_come_in_the_order_of_their_calls() -> None:
    assert list(sites_of(settled(Residual()))) == [
        "stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.downsample.0",
    ]  # fmt: skip


def test_a_model_without_convolutions_has_no_sites() -> None:
    assert sites_of(nn.Sequential(nn.Flatten(), nn.Linear(432, 2))) == {}


def test_hooks_are_removed_when_the_model_fails() -> None:
    def refuse(model: Calls, x: Tensor) -> Tensor:
        model.conv(x)
        raise RuntimeError("no")

    model = Calls(refuse, conv=conv())
    traced = trace(model)
    with pytest.raises(TraceError, match="does not run"):
        find_sites(model, (X,), traced)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- refusals


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor, factor: float = 2) -> Tensor:
        return factor * super().forward(x)


@pytest.mark.parametrize("given", [(), (3.0,)], ids=["input", "more"])
def test_a_subclass_is_refused_for_its_own_forward_whatever_it_is_given(given: tuple[float, ...]) -> None:
    site = sites_of(Calls(lambda m, x: m.conv(x, *given), conv=Scaled(3, 4, 3)))["conv"]
    assert site.refusal == (
        "Scaled is a subclass of a convolution and may have a forward of its own; a plain convolution that its forward calls "
        "would be a site"
    )
    assert site.spec == ConvSpec(3, 4, (3, 3))


class Masked(nn.Conv2d):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(pair[0]) * pair[1]


class Styled(nn.Conv2d):
    def forward(self, style: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * style


class Kernel(nn.Conv2d):
    def forward(self) -> Tensor:  # type: ignore[override]
        return self.weight / self.weight.detach().norm()


@pytest.mark.parametrize(
    ("make", "forward", "sizes"),
    [
        (Masked, lambda m, x: m.conv((x, x[:, :1, 2:, 2:])), ((12, 12),)),
        (Styled, lambda m, x: m.conv(x.mean(), x), ((12, 12),)),
        (Kernel, lambda m, x: F.conv2d(x, m.conv()), ()),
    ],
)
def test_a_subclass_may_take_something_else_before_its_input_or_nothing(
    make: type[nn.Conv2d], forward: Callable[[Calls, Tensor], Tensor], sizes: tuple[tuple[int, int], ...]
) -> None:
    site = sites_of(Calls(forward, conv=make(3, 4, 3)))["conv"]
    assert str(site.refusal).startswith(f"{make.__name__} is a subclass of a convolution")
    assert site.input_sizes == sizes


def test_a_subclass_of_the_same_name_is_called_by_its_module() -> None:
    same = type("Conv2d", (Scaled,), {"__module__": "elsewhere"})
    site = sites_of(Calls(lambda m, x: m.conv(x), conv=same(3, 4, 3)))["conv"]
    assert str(site.refusal).startswith("elsewhere.Conv2d is a subclass of a convolution")


def test_a_pruned_convolution_is_refused_with_how_to_make_it_final() -> None:
    layer = prune.l1_unstructured(conv(), "weight", 0.5)
    for pruned in (layer, prune.l1_unstructured(StandardConv2d(3, 4), "weight", 0.5)):
        assert str(sites_of(nn.Sequential(pruned))["0"].refusal).endswith(
            "call torch.nn.utils.prune.remove on it before"
        )
    assert sites_of(nn.Sequential(prune.remove(layer, "weight")))["0"].refusal is None


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    layer = conv()
    layer.forward = lambda x: 2 * x  # type: ignore[method-assign]
    assert "replaced on the instance" in str(sites_of(nn.Sequential(layer))["0"].refusal)


def test_modules_that_share_a_parameter_are_refused() -> None:
    first, second, third = conv(), conv(), conv()
    second.weight = first.weight
    sites = sites_of(nn.Sequential(first, second, third))
    assert [sites[name].refusal for name in "012"] == ["shares its weight with 1", "shares its weight with 0", None]


def test_a_weight_that_another_layer_holds_too_is_refused() -> None:
    model = Calls(lambda m, x: m.conv(x), conv=conv(), other=nn.Module())
    model.other.table = model.conv.weight
    assert sites_of(model)["conv"].refusal == "shares its weight with other"


def test_a_weight_that_a_functional_call_uses_too_is_refused() -> None:
    """The functional call would look for a weight that is no longer there."""
    model = Calls(lambda m, x: F.conv2d(m.conv(x), m.conv.weight), conv=conv())
    sites = sites_of(model)
    assert "functional call" in str(sites["conv"].refusal)
    assert "functional call on conv.weight" in str(sites["#0"].refusal)


def test_a_convolution_that_is_called_with_other_weights_than_its_own_is_refused() -> None:
    def forward(m: Calls, x: Tensor) -> Tensor:
        doubled = {name: 2 * own for name, own in m.conv.named_parameters()}
        same = dict(m.other.named_parameters())
        return torch.func.functional_call(m.other, same, torch.func.functional_call(m.conv, doubled, x))

    sites = sites_of(Calls(forward, conv=conv(), other=conv()))
    assert [sites[name].refusal for name in ("conv", "other")] == [OTHER_WEIGHTS, None]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_convolution_with_hooks_is_refused(register: str) -> None:
    model = nn.Sequential(conv(), nn.ReLU())
    handle = getattr(model[0], register)(lambda *args: None)
    assert "hooks" in str(sites_of(model)["0"].refusal)
    handle.remove()
    assert sites_of(model)["0"].refusal is None


def test_a_convolution_that_holds_more_than_its_weights_is_refused() -> None:
    model = nn.Sequential(conv(), conv(), conv())
    model[0].register_buffer("mask", torch.ones(1))
    model[1].observer = nn.Identity()
    refusals = [site.refusal for site in sites_of(model).values()]
    assert refusals == [
        *(f"holds {name} besides its weight and bias, which a replacement would lose" for name in ("mask", "observer")),
        None,
    ]
    norms = nn.Sequential(conv(), nn.BatchNorm2d(3), conv(), nn.BatchNorm2d(3)).eval()
    norms[1].register_buffer("mask", torch.ones(1))
    assert [site.batch_norm for site in sites_of(norms).values()] == [None, "3"]


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(conv(), conv())
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    assert [site.refusal for site in sites_of(model).values()] == [None, "its weight holds NaN or infinity"]


def test_a_parametrised_convolution_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(conv()))
    assert "subclass" in str(sites_of(model)["0"].refusal)


# --- functional calls


class Functional(nn.Module):
    """Convolutions as functions: on a parameter, on a computed weight, and by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("blur", torch.ones(4, 1, 3, 3) / 9)
        self.factor = nn.Parameter(torch.randn(2, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, None, 2, (1, 0))
        x = torch.conv2d(input=x, weight=self.blur, padding="same", groups=4)
        x = F.conv_transpose2d(x, self.factor.transpose(0, 1), stride=2, output_padding=1)
        return F.conv2d(x, self.factor.square().transpose(0, 1).softmax(0))


def test_functional_calls_are_sites_with_a_reason() -> None:
    sites = sites_of(Functional())
    assert [site.kind for site in sites.values()] == [Kind.STANDARD, Kind.DEPTHWISE, Kind.TRANSPOSED, Kind.POINTWISE]
    assert sites["#0"].spec == ConvSpec(3, 4, (3, 3), (2, 2), (1, 0), bias=False)
    assert sites["#1"].spec == ConvSpec(4, 4, (3, 3), padding="same", groups=4, bias=False)
    assert sites["#2"].spec == ConvSpec(4, 2, (1, 1), (2, 2), bias=False, transposed=True, output_padding=(1, 1))
    reasons = [str(site.refusal) for site in sites.values()]
    assert "functional call on weight" in reasons[0]
    assert "functional call on blur" in reasons[1]
    assert (
        reasons[2] == reasons[3] == "the kernel is no parameter or buffer, but computed at every call or held elsewhere"
    )


def test_a_constant_kernel_that_the_model_does_not_hold_is_not_told_to_come_from_parameters() -> None:
    """As kernels of kornia's derivatives and of julius' resampling, which are made of numbers alone."""
    kernel = torch.ones(4, 4, 3, 3)

    class Blur(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, kernel)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Blur()).eval()
    (site,) = (one for name, one in sites_of(model).items() if name != "0")
    assert "parameters" not in str(site.refusal)
    assert "held elsewhere" in str(site.refusal)


class Looking(nn.Module):
    """Its kernel is looked up, by whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return F.conv2d(x, self.table(rows[0]).reshape(3, 3, 1, 1))


def test_a_kernel_that_whole_numbers_choose_is_computed_from_the_input() -> None:
    model = Looking()
    (site,) = find_sites(model, (X, torch.tensor([[0, 1, 2], [2, 1, 0]])), trace(model))
    assert (site.kind, site.refusal) == (Kind.DYNAMIC, COMPUTED[True])


def test_a_model_that_refuses_other_numbers_keeps_a_computed_kernel() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        assert torch.equal(x, x.round())
        return F.conv2d(x, model.conv.weight * x.mean())

    (computed, _) = sites_of(Calls(forward, conv=conv()), X.round()).values()
    assert (computed.kind, computed.refusal) == (Kind.STANDARD, COMPUTED[None])


def test_a_kernel_per_example_counts_its_examples_as_groups() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = model.make(x.mean((2, 3))).reshape(n * 4, c, 1, 1)
        return F.conv2d(x.reshape(1, n * c, h, w), kernels, groups=n).reshape(n, 4, h, w)

    site = sites_of(Calls(forward, make=nn.Linear(3, 12)))["#0"]
    assert (site.kind, site.spec.groups, site.input_sizes) == (Kind.DYNAMIC, 2, ((12, 12),))
    assert site.cost.macs == 4 * 3 * 144


# --- dynamic convolutions


def test_a_dynamic_convolution_is_one_site_with_its_kernels_stacked() -> None:
    dynamic = DynamicConv2d(3, 4, 3, kernels=2, groups=1)
    model = Calls(lambda m, x: m.dynamic(F.max_pool2d(m.dynamic(x)[:, :3], 2)), dynamic=dynamic).eval()
    site = sites_of(model)["dynamic"]
    assert (site.kind, site.refusal, site.input_sizes) == (Kind.DYNAMIC, None, ((12, 12), (6, 6)))
    assert site.spec == ConvSpec(3, 8, (3, 3), padding=(1, 1), kernels=2)
    assert site.cost == Cost(2 * (4 * 3 * 9 + 4), 4 * 3 * 9 * (144 + 36) + 2 * 2 * (4 * 3 * 9 + 4))


def test_dynamic_convolutions_that_cannot_be_rewritten() -> None:
    class Twice(DynamicConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    uneven = DynamicConv2d(3, 4, 4, stride=2)
    model = Calls(lambda m, x: m.own(x) + m.uneven(x).mean() + m.even(x).mean(), own=Twice(3, 4), uneven=uneven)
    model.even = DynamicConv2d(3, 4, 4)
    model.unused = DynamicConv2d(3, 4)
    sites = sites_of(model.eval())
    assert "subclass" in str(sites["own"].refusal)
    assert sites["uneven"].refusal == "it strides over an uneven padding, which no static convolution can do"
    assert sites["even"].refusal is None
    assert "never calls it" in str(sites["unused"].refusal)
    assert len(sites) == 4
    half = DynamicConv2d(3, 4, kernels=1)
    half.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1), nn.Sigmoid())
    assert "may not always take all of it" in str(sites_of(nn.Sequential(half).eval())["0"].refusal)


# --- one and three dimensions

ROWS = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(0))


def test_one_dimensional_convolutions_are_sites_with_their_batch_norm() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 5, stride=2), nn.BatchNorm1d(4), nn.ReLU(),
        nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 6, 1), nn.ConvTranspose1d(6, 2, 4, stride=2),
    ).eval()  # fmt: skip
    sites = sites_of(model, ROWS)
    assert [site.kind for site in sites.values()] == [
        Kind.STANDARD, Kind.SEPARABLE, Kind.SEPARABLE, Kind.TRANSPOSED,
    ]  # fmt: skip
    assert [site.refusal for site in sites.values()] == [None] * 4
    assert [site.batch_norm for site in sites.values()] == ["1", None, None, None]
    assert sites["0"].input_sizes == ((1, 30),)
    assert sites["0"].spec.describe() == "3->4 5 s2"
    assert sites["0"].cost == Cost(3 * 4 * 5 + 4 + 8, 13 * 3 * 4 * 5)


def test_a_batch_norm_of_another_dimension_is_not_folded() -> None:
    model = Calls(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=nn.BatchNorm1d(3)).eval()
    with pytest.raises(TraceError):
        sites_of(model)


def test_three_dimensional_convolutions_are_shown_with_a_reason() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        volume = model.up(model.conv(x[:, :, None].expand(-1, -1, 4, -1, -1)))
        return F.conv3d(volume, model.conv.weight[:, :2]).mean()

    model = Calls(forward, conv=nn.Conv3d(3, 4, 3, padding=1, groups=1), up=nn.ConvTranspose3d(4, 2, 2, stride=2))
    model.unused = nn.Conv3d(1, 2, (3, 1, 1))
    sites = sites_of(model.eval())
    assert {name: site.spec.describe() for name, site in sites.items()} == {
        "conv": "3->4 3x3x3 p1", "up": "4->2 2x2x2 s2 transposed", "#0": "2->4 3x3x3", "unused": "1->2 3x1x1",
    }  # fmt: skip
    reasons = [site.refusal for site in sites.values()]
    assert reasons[:3] == ["three-dimensional convolutions are not rewritten"] * 3
    assert "never calls it" in str(reasons[3])
    assert sites["conv"].cost == Cost(3 * 4 * 27 + 4, 4 * 12 * 12 * 3 * 4 * 27)
    assert sites["up"].cost.macs == 4 * 12 * 12 * 4 * 2 * 8


# --- BatchNorm


def test_batch_norm_that_alone_follows_is_folded() -> None:
    sites = sites_of(settled(Residual()))
    assert sites["stem"].batch_norm == "bn"
    assert sites["blocks.1.conv2"].batch_norm == "blocks.1.bn2"
    assert sites["blocks.1.downsample.0"].batch_norm == "blocks.1.downsample.1"
    assert sites["stem"].folded_spec.bias and not sites["stem"].spec.bias
    assert sites["stem"].cost.parameters == 3 * 8 * 9 + 16


@pytest.mark.parametrize(("affine", "numbers"), [(True, 16), (False, 0)])
def test_a_batch_norm_costs_the_numbers_that_it_has(affine: bool, numbers: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=affine))
    (site,) = sites_of(settled(model)).values()
    assert (site.batch_norm, site.cost.parameters) == ("1", 3 * 8 * 9 + numbers)
    assert site.cost.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_batch_norm_is_not_folded_into_a_convolution_called_twice() -> None:
    assert sites_of(settled(CalledTwice()))["shared"].batch_norm is None


def test_batch_norm_that_is_called_twice_is_not_folded() -> None:
    model = Calls(lambda m, x: m.bn(m.second(m.bn(m.first(x)))), first=conv(), second=conv(), bn=nn.BatchNorm2d(3))
    assert [site.batch_norm for site in sites_of(settled(model)).values()] == [None, None]


def test_batch_norm_is_not_folded_when_the_output_is_used_elsewhere_too() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        x = model.conv(x)
        return model.bn(x) + x

    assert sites_of(settled(Calls(forward, conv=conv(), bn=nn.BatchNorm2d(3))))["conv"].batch_norm is None


def test_batch_norm_is_not_folded_when_the_output_is_returned_too() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        x = model.conv(x)
        return model.bn(x), x  # type: ignore[return-value]

    assert sites_of(settled(Calls(forward, conv=conv(), bn=nn.BatchNorm2d(3))))["conv"].batch_norm is None


def test_batch_norm_in_train_mode_or_without_statistics_is_not_folded() -> None:
    model = settled(Chain())
    model[1].train()
    assert [site.batch_norm for site in sites_of(model).values()] == [None, "4", None]
    assert sites_of(nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False)).eval())["0"].batch_norm is None


def test_batch_norm_that_divides_by_zero_is_not_folded() -> None:
    for variance in (0.0, -1.0, float("nan")):
        model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.0)))
        assert sites_of(model)["0"].batch_norm == "1"
        model[1].running_var[3] = variance
        assert sites_of(model)["0"].batch_norm is None


def test_batch_norm_of_a_refused_convolution_is_not_folded() -> None:
    model = nn.Sequential(Scaled(3, 3, 3), nn.BatchNorm2d(3)).eval()
    assert sites_of(model)["0"].batch_norm is None


def test_batch_norm_with_hooks_is_not_folded() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3)).eval()
    model[1].register_forward_hook(lambda *args: None)
    assert sites_of(model)["0"].batch_norm is None


def data_dependent(x: Tensor) -> Tensor:
    """Something no graph can follow."""
    return x if float(x.detach().mean()) > -1e9 else -x


def test_batch_norm_is_not_folded_when_a_part_without_a_graph_calls_the_convolution_too() -> None:
    block = Calls(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(3))
    model = settled(Calls(lambda m, x: m.block.conv(data_dependent(m.block(x))), block=block))
    site = sites_of(model)["block.conv"]
    assert len(site.input_sizes) == 2
    assert site.batch_norm is None


def test_batch_norm_that_two_parts_share_is_not_folded() -> None:
    norm = nn.BatchNorm2d(3)
    blocks = [Calls(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=norm) for _ in range(2)]
    model = settled(Calls(lambda m, x: m.second(data_dependent(m.first(x))), first=blocks[0], second=blocks[1]))
    assert [site.batch_norm for site in sites_of(model).values()] == [None, None]


def test_the_graph_of_a_part_that_is_never_called_as_such_says_nothing() -> None:
    """The layers of a Sequential, run one by one by a forward that keeps every value on the way."""

    def forward(model: Calls, x: Tensor) -> Tensor:
        kept = []
        for layer in model.layers:
            x = layer(data_dependent(x))
            kept.append(x)
        return sum(kept)  # type: ignore[return-value]

    layers = nn.Sequential(conv(), nn.BatchNorm2d(3), conv())
    model = settled(Calls(forward, layers=nn.Sequential(layers[0], layers[1], nn.Identity(), layers[2])))
    assert [site.batch_norm for site in sites_of(model).values()] == [None, None]
