"""The methods of two papers, as the benchmark makes them from this tool's parts, are what their formulas say."""

from functools import cache

import papers
import pytest
import torch
from goals import unexplained
from torch import Tensor, nn

from convrewrite.structures import compose, discover


@cache
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(12, 16, 3, stride=2))
    model[2].running_mean = torch.randn(12)
    model[2].running_var = torch.rand(12) + 0.5
    return model.eval()


@cache
def images() -> Tensor:
    return torch.randn(40, 2, 9, 9, generator=torch.Generator().manual_seed(1))


@cache
def layers() -> list[papers.Layer]:
    return papers.layers_of(network(), images())


def whole(layer: papers.Layer) -> int:
    return layer.site.cost.macs


def test_all_convolutions_but_the_first_are_layers() -> None:
    assert [layer.site.name for layer in layers()] == ["1", "4"]


def test_moments_are_those_of_the_patches_about_zero() -> None:
    with torch.no_grad():
        patches = nn.functional.unfold(network()[0](images()), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    found = layers()[0].moments.cov_p
    assert torch.allclose(found, patches.T @ patches / len(patches), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_svd_leaves_the_energy_of_the_singular_values_it_drops(rank: int) -> None:
    layer = layers()[1]
    found = layer.fitted(discover()["channel"], {"rank": rank}, 0)
    assert found.unexplained == pytest.approx(float(layer.energies()[rank:].sum()), rel=1e-4)


@pytest.mark.parametrize("structure", ["tucker", "cp"])
def test_factors_in_the_metric_leave_no_more_than_those_of_the_weights(structure: str) -> None:
    layer, family = layers()[1], discover()[structure]
    kernels = family.weights(layer.kernel, layer.site.spec, {"rank": 5})
    composed = compose(kernels, family.stages(layer.site.spec, {"rank": 5}))
    assert layer.fitted(family, {"rank": 5}).unexplained < unexplained(composed, layer.moments)


@pytest.mark.parametrize("name", papers.METHODS)
def test_a_method_keeps_within_its_budget(name: str) -> None:
    limit = sum(map(whole, layers())) // 2
    chosen = papers.Method(name, layers()).choose(limit)
    left = [
        whole(layer) if option is None else layer.macs(option.structure, option.setting)
        for layer, option in zip(layers(), chosen, strict=True)
    ]
    assert 0.7 * limit < sum(left) <= limit


def test_the_budget_goes_where_it_saves_most_energy() -> None:
    """Against every other choice of two ranks."""
    method, limit = papers.Method("svd", layers()), sum(map(whole, layers())) // 2
    options = [method._spectrum(layer) | {None: 0.0} for layer in layers()]

    def macs(layer: papers.Layer, option: papers.Chosen | None) -> int:
        return whole(layer) if option is None else layer.macs(option.structure, option.setting)

    pairs = [(a, b) for a in options[0] for b in options[1]]
    within = [(a, b) for a, b in pairs if macs(layers()[0], a) + macs(layers()[1], b) <= limit]
    best = min(options[0][a] + options[1][b] for a, b in within)
    first, second = method.choose(limit)
    assert options[0][first] + options[1][second] == pytest.approx(best, rel=1e-9)


def test_a_budget_below_the_lowest_ranks_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected a budget of at least"):
        papers.Method("svd", layers()).choose(10)


def test_full_ranks_in_place_compute_the_same() -> None:
    channel = discover()["channel"]
    ranks = [12, 16]
    chosen = [papers.Chosen(layer, channel, papers._Setting(rank=r)) for layer, r in zip(layers(), ranks, strict=True)]
    with torch.no_grad():
        assert torch.allclose(
            papers.carried_out(network(), chosen)(images()), network()(images()), rtol=1e-3, atol=1e-4
        )
