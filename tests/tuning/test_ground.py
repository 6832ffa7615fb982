"""What tuning stands on: which parameters train, through which kernel, towards what."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from convrewrite.conv import ConvSpec
from convrewrite.errors import UsageError
from convrewrite.layers import SumOfBranches
from convrewrite.meanings import Meaning, RunningFidelity
from convrewrite.rewriting.surgery import build_option
from convrewrite.structures import Option, Structure, discover, initial_kernels, lowerings
from convrewrite.tuning.blocks import joins, observed
from convrewrite.tuning.composition import composed, composition_of
from convrewrite.tuning.losses import Distillation, output_loss
from convrewrite.tuning.trainable import every_parameter, numbers_of, put_numbers, rewritten_parameters, training

EPS = 64 * torch.finfo(torch.float64).eps


def chain(*specs: ConvSpec) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(spec.build(torch.float64) for spec in specs))


CHAINS = {
    "asymmetric, strided": [
        ConvSpec(4, 3, (3, 1), (2, 1), (1, 0), bias=False),
        ConvSpec(3, 6, (1, 3), (1, 2), (0, 1)),
    ],
    "separable": [ConvSpec(4, 8, (3, 3), (1, 1), (1, 1), groups=4, bias=False), ConvSpec(8, 5, (1, 1))],
    "grouped, dilated": [
        ConvSpec(4, 4, (3, 3), (1, 1), (2, 1), (2, 3), groups=2, bias=False),
        ConvSpec(4, 6, (1, 1), groups=2),
    ],
    "three stages, reflected": [
        ConvSpec(4, 2, (1, 1), bias=False),
        ConvSpec(2, 3, (3, 3), (1, 1), (1, 1), bias=False, padding_mode="reflect"),
        ConvSpec(3, 6, (1, 1), bias=False),
    ],
    "even, same": [ConvSpec(4, 3, (1, 4), padding="same", bias=False), ConvSpec(3, 4, (2, 1), padding="same")],
    "one axis": [ConvSpec(4, 2, (1, 5), padding=(0, 2), bias=False, dims=1), ConvSpec(2, 4, (1, 1), dims=1)],
    "strided pointwise": [ConvSpec(4, 2, (1, 1), (2, 2), bias=False), ConvSpec(2, 4, (1, 1))],
}


@pytest.mark.parametrize("specs", CHAINS.values(), ids=CHAINS.keys())
def test_the_composed_kernel_gives_what_the_chain_gives_and_the_same_gradients(specs: list[ConvSpec]) -> None:
    model = chain(*specs)
    x = torch.randn(2, 4, *([9] if specs[0].dims == 1 else [8, 9]), dtype=torch.float64)
    expected = model(x)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    way = composition_of(model)
    assert way is not None
    found = way(x)
    gradients = torch.autograd.grad((found * weights).sum(), list(model.parameters()))
    assert torch.allclose(found, expected, rtol=EPS, atol=EPS)
    for one, two in zip(gradients, wanted, strict=True):
        assert torch.allclose(one, two, rtol=1e3 * EPS, atol=1e3 * EPS)


def test_a_sum_of_branches_is_one_convolution() -> None:
    first, last = ConvSpec(3, 3, (3, 3), padding=(1, 1), groups=3, bias=False), ConvSpec(3, 5, (1, 1))
    branches = SumOfBranches([chain(first, last), chain(first, ConvSpec(3, 5, (1, 1), bias=False))])
    way = composition_of(branches)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert way is not None
    assert torch.allclose(way(x), branches(x), rtol=EPS, atol=EPS)


@pytest.mark.parametrize("name", sorted(discover()))
@pytest.mark.parametrize("groups", [1, 2])
def test_every_structure_computes_the_same_through_its_composed_kernel(name: str, groups: int) -> None:
    structure = discover()[name]
    spec = ConvSpec(8, 8, (3, 3), (2, 1), (1, 1), groups=groups)
    x = torch.randn(2, 8, 7, 8, dtype=torch.float64)
    assert structure.reject(spec.per_group) is None
    for built in _built(structure, spec):
        way = composition_of(built)
        assert way is not None and torch.allclose(way(x), built(x), rtol=1e3 * EPS, atol=1e3 * EPS)


def _built(structure: Structure, spec: ConvSpec) -> Iterator[nn.Module]:
    """Every variant of a structure at rank 2, in every lowering."""
    kernel = torch.randn(spec.kernel_shape, dtype=torch.float64)
    for variant in structure.variants(spec.per_group):
        setting = {**variant, "rank": 2}
        kernels = initial_kernels(structure, kernel, spec, setting)
        stages = structure.stages(spec.per_group, setting)
        for lowering in lowerings(stages):
            option = Option(structure.name, tuple(sorted(setting.items())), lowering)
            yield build_option(spec, stages, option, kernels, torch.randn(8, dtype=torch.float64), kernel)


@pytest.mark.parametrize(
    "module",
    [
        chain(ConvSpec(4, 4, (3, 3), bias=False), ConvSpec(4, 4, (3, 3))),
        chain(ConvSpec(4, 4, (1, 1)), ConvSpec(4, 4, (3, 3), padding=(1, 1))),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, bias=False), nn.ConvTranspose2d(4, 4, 1)),
        nn.Sequential(nn.Conv2d(4, 4, 3)),
    ],
    ids=["two kernels", "a bias before padding", "a ReLU", "transposed", "one stage"],
)
def test_what_is_no_one_convolution_stays_as_it_is(module: nn.Module) -> None:
    assert composition_of(module) is None


@pytest.mark.parametrize(
    ("bfloat16", "expected"), [(False, [True, False, False, False]), (True, [True, True, False, False])]
)
def test_within_the_block_a_site_computes_through_its_kernel_where_that_pays(
    bfloat16: bool, expected: list[bool]
) -> None:
    first, last = ConvSpec(64, 64, (3, 1), padding=(1, 0), bias=False), ConvSpec(64, 64, (1, 3), padding=(0, 1))
    sites = {name: chain(replace(first, out_channels=rank), replace(last, in_channels=rank))
             for name, rank in (("dear", 96), ("cheap", 48), ("sparing", 16))}  # fmt: skip
    model = nn.ModuleDict({**sites, "relu": nn.ReLU()})
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    before = model["dear"](x)
    with composed(model, list(model), bfloat16):
        assert ["forward" in vars(module) for module in model.values()] == expected
        assert torch.allclose(model["dear"](x), before, rtol=EPS, atol=EPS)
    assert not any("forward" in vars(module) for module in model.values())


@pytest.mark.parametrize(
    ("channels", "pointwise_first", "expected"), [(64, True, True), (64, False, False), (16, False, True)]
)
def test_what_convolutions_read_and_write_counts_and_where_a_stride_comes(
    channels: int, pointwise_first: bool, expected: bool
) -> None:
    spec = ConvSpec(channels, channels, (1, 1), bias=False)
    strided = replace(spec, kernel_size=(3, 3), padding=(1, 1), stride=(2, 2), groups=channels)
    order = [spec, strided] if pointwise_first else [strided, spec]
    way = composition_of(SumOfBranches([chain(*order), chain(*order)]))
    assert way is not None
    assert way.pays() == expected


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 2, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(2, 3, 1))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(x + self.norm(self.conv(x)))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.block(x)).mean((2, 3)))
        return out


def test_only_rewritten_stages_train_and_all_is_given_back() -> None:
    model = Net().train()
    model.head.weight.requires_grad_(False)
    chosen = rewritten_parameters(model, ["block.conv"])
    assert list(chosen) == ["block.conv.0.weight", "block.conv.1.weight", "block.conv.1.bias"]
    before = numbers_of(every_parameter(model))
    with training(model, chosen):
        assert not model.block.norm.training
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in chosen.values())
        assert model.body[0].weight.grad is None
        with torch.no_grad():
            chosen["block.conv.0.weight"].add_(1)
    assert model.block.norm.training and not model.head.weight.requires_grad and model.body[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    put_numbers(every_parameter(model), before)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    with pytest.raises(UsageError, match="no module of this name"):
        rewritten_parameters(model, ["gone"])


def test_joins_are_ends_of_blocks_and_else_what_is_behind_sites() -> None:
    original, rewritten, x = Net(), Net(), torch.randn(2, 3, 4, 4)
    assert joins(original, rewritten, {"block.conv": "block.norm", "body.0": None}, (x,)) == ("block", "body.1")
    with observed(rewritten, ["block", "body.1"]) as seen:
        rewritten(x)
        block = seen["block"]
    assert torch.equal(block, rewritten.block(x))


KINDS = ["logits", "probabilities", "multilabel", "embedding", "values"]


def outputs(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 5, generator=generator)
    return {"probabilities": values.softmax(1), "multilabel": values.sigmoid()}.get(kind, values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_the_effect_that_is_reported(kind: str) -> None:
    wanted, found = outputs(kind, 0), outputs(kind, 1)
    meaning = Meaning(kind, "")  # type: ignore[arg-type]
    loss = Distillation.of({"output": wanted}, {"output": meaning})
    fidelity = RunningFidelity({"output": meaning})
    fidelity.add({"output": wanted}, {"output": found})
    value = float(loss({"output": wanted}, {"output": found}, {}, {}))
    assert value == pytest.approx(fidelity.outputs()[0].effect, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(kind: str) -> None:
    wanted, found = outputs(kind, 0), outputs(kind, 1)
    loss = Distillation.of({"output": wanted}, {"output": Meaning(kind, "")}, {"f": wanted}, 4.0, 0.5)  # type: ignore[arg-type]

    def of(part: slice) -> float:
        named = {"output": wanted[part]}, {"output": found[part]}, {"f": wanted[part]}, {"f": found[part]}
        return float(loss(*named))

    assert of(slice(0, 6)) == pytest.approx((of(slice(0, 3)) + of(slice(3, 6))) / 2, rel=1e-5)


def test_masked_scores_have_finite_gradients() -> None:
    wanted = torch.tensor([[0.0, 1.0, -math.inf]])
    found = torch.tensor([[1.0, 0.0, -math.inf]], requires_grad=True)
    output_loss(wanted, found, Meaning("logits", ""), torch.ones(1), 2.0).backward()
    assert found.grad is not None and bool(found.grad.isfinite().all()) and float(found.grad[0, 0]) > 0


def test_outputs_without_gradients_are_refused_where_nothing_else_is_there() -> None:
    whole = {"output": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(UsageError, match="discrete"):
        Distillation.of(whole, {"output": Meaning("discrete", "")})
