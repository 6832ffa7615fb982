"""The weights of a site's outputs: F against brute force, sample by sample, and what a fit makes of them."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from networks import Branching, CalledTwice, Calls, Chain, NineKinds, Residual, natural, settled, state_bytes
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convrewrite.calibration.batches import Calibration
from convrewrite.conv import ConvSpec
from convrewrite.fitting.found import Fit
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.inputs import Inputs
from convrewrite.meanings.kinds import Meaning, tell
from convrewrite.meanings.variation import Variation
from convrewrite.modules.outputs import named_outputs
from convrewrite.progress import Stopwatch
from convrewrite.rewriting import output_weighting
from convrewrite.rewriting.output_weighting import EXAMPLES, SHARE, _loss, output_weights, roots_of
from convrewrite.rewriting.propagation import Propagation
from convrewrite.rewriting.site_fit import SiteFit
from convrewrite.structures.algebra import compose
from convrewrite.structures.structure import Option, Structure

SEED = 3
ONE = torch.ones(1)


def scales_of(output: Tensor, meaning: Meaning) -> Tensor:
    variation = Variation(meaning)
    variation.see(output)
    return variation.scales()


def batches(count: int = 2, size: int = 4, side: int = 12) -> list[tuple[Tensor, ...]]:
    """The same ones at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [(part,) for part in natural(count * size, 3, side, side).split(size)]


def sites_of(model: nn.Module) -> list[Site]:
    example = (torch.zeros(1, 3, 12, 12, dtype=next(model.parameters()).dtype),)
    return [site for site in find_sites(model, example, trace(model)) if site.refusal is None]


def losses(
    outputs: dict[str, Tensor],
    meanings: Mapping[str, Meaning],
    scales: Mapping[str, Tensor],
    generator: torch.Generator,
) -> list[Callable[[dict[str, Tensor], int], Tensor]]:
    """For every output of a batch, the loss of one of its examples, with the same labels and directions drawn."""
    found: list[Callable[[dict[str, Tensor], int], Tensor]] = []
    for name, output in outputs.items():
        if meanings[name].kind == "logits":
            labels = torch.multinomial(output.log_softmax(1).exp(), 1, generator=generator)[:, 0]
            found.append(lambda o, i, n=name, y=labels: F.cross_entropy(o[n], y[i : i + 1]))  # type: ignore[misc]
        else:
            direction = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            scale = (scales[name] * output[0].numel()).sqrt()
            scale = scale if len(scale) == 1 else scale.view(-1, *(1,) * (output.dim() - 2))
            found.append(lambda o, i, n=name, d=direction, s=scale: (o[n] * d[i] / s).sum())  # type: ignore[misc]
    return found


def brute_force(
    model: nn.Module,
    site: Site,
    inputs: Sequence[tuple[Tensor, ...]],
    meanings: Mapping[str, Meaning] | None = None,
) -> Tensor:
    """``sum g g^T`` over examples and positions; the gradient is that of a disturbance added to the site's output."""
    generator = torch.Generator().manual_seed(SEED)
    module = model.get_submodule(site.batch_norm or site.name)
    total = torch.zeros(site.spec.out_channels, site.spec.out_channels, dtype=torch.float64)
    meanings = meanings or tell(model, inputs)
    with torch.no_grad():
        every = named_outputs(model(torch.cat([batch for (batch,) in inputs])))
    scales = {name: scales_of(output, meanings[name]) for name, output in every.items()}
    for (batch,) in inputs:
        with torch.no_grad():
            drawn = losses(named_outputs(model(batch.clone())), meanings, scales, generator)
        for index in range(len(batch)):
            added: list[Tensor] = []

            def disturb(_module: nn.Module, _args: object, output: Tensor, added: list[Tensor] = added) -> Tensor:
                added.append(torch.zeros_like(output).requires_grad_())
                return output + added[-1]

            handle = module.register_forward_hook(disturb)
            outputs = named_outputs(model(batch[index : index + 1].clone()))
            handle.remove()
            loss = torch.stack([one(outputs, index) for one in drawn]).sum()
            for gradient in torch.autograd.grad(loss, added):
                rows = gradient[0].flatten(1)
                total += rows @ rows.T
    return total


def weights_of(
    model: nn.Module, sites: Sequence[Site], given: Sequence[Inputs], seed: int, at_a_time: int | None = None
) -> dict[str, Tensor]:
    """The weights, for outputs that mean what they are taken for."""
    meanings = tell(model, given) if given else {}
    return output_weights(model, sites, given, seed, meanings=meanings, at_a_time=at_a_time)


def mixed(second_moment: Tensor, share: float = SHARE) -> Tensor:
    normal = second_moment / second_moment.diagonal().mean()
    return share * normal + (1 - share) * torch.eye(len(normal), dtype=torch.float64)


@pytest.mark.parametrize("network", [Residual, Chain, Branching, CalledTwice], ids=lambda n: n.__name__)
def test_the_weights_are_those_of_gradients_taken_one_by_one(network: type[nn.Module]) -> None:
    model = settled(network().double())
    before = state_bytes(model)
    found = weights_of(model, sites_of(model), batches(), SEED)
    assert state_bytes(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(found) == {site.name for site in sites_of(model)}
    for site in sites_of(model):
        expected = mixed(brute_force(model, site, batches()))
        assert found[site.name].dtype == torch.float64
        assert torch.allclose(found[site.name], expected, atol=1e-5)
        assert float(found[site.name].diagonal().mean()) == pytest.approx(1)
        assert (found[site.name] - torch.eye(len(expected))).abs().max() > 0.01, "they say something"


def test_numbers_are_weighed_alike_by_a_model_that_takes_one_example_at_a_time() -> None:
    layers = {"stem": nn.Conv2d(3, 6, 3), "conv": nn.Conv2d(6, 3, 3)}
    model, given = (
        settled(Calls(lambda self, x: self.conv(self.stem(x)).mean((2, 3)), **layers).double()),
        batches(6, 1),
    )
    meanings = {"output": Meaning("values", "")}
    found = output_weights(model, sites_of(model), given, SEED, meanings=meanings, at_a_time=1)
    for site in sites_of(model):
        assert torch.allclose(found[site.name], mixed(brute_force(model, site, given, meanings)), atol=1e-5)


def test_a_dictionary_of_outputs_counts_whole() -> None:
    model = settled(
        Calls(
            lambda self, x: {"map": self.conv(self.stem(x)), "scores": self.conv(self.stem(x)).mean((2, 3))},
            stem=nn.Conv2d(3, 6, 3), conv=nn.Conv2d(6, 5, 3),
        ).double()
    )  # fmt: skip
    found = weights_of(model, sites_of(model), batches(), SEED)
    for site in sites_of(model):
        assert torch.allclose(found[site.name], mixed(brute_force(model, site, batches())), atol=1e-5)


def test_a_model_that_takes_so_many_examples_at_a_time_gets_so_many() -> None:
    model = settled(
        Calls(
            lambda self, x: self.conv(self.stem(x)).reshape(20, 5 * 2 * 2),
            stem=nn.Conv2d(3, 6, 3),
            conv=nn.Conv2d(6, 5, 3),
        ).double()
    )
    given = batches(15, 20, side=6)
    sites = find_sites(model, given[0], trace(model))
    assert set(weights_of(model, sites, given, SEED, at_a_time=20)) == {"stem", "conv"}


def test_frozen_parameters_change_nothing() -> None:
    model = settled(Residual().double())
    free = weights_of(model, sites_of(model), batches(), SEED)
    frozen = weights_of(model.requires_grad_(False), sites_of(model), batches(), SEED)
    assert set(free) == set(frozen)
    assert all(torch.allclose(free[name], frozen[name]) for name in free)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradients_may_be_switched_off_around_it() -> None:
    model = settled(Residual().double())
    with torch.no_grad():
        found = weights_of(model, sites_of(model), batches(), SEED)
        assert not torch.is_grad_enabled()
    assert set(found) == {site.name for site in sites_of(model)}


def test_independent_probabilities_weigh_by_their_own_information() -> None:
    chances = torch.tensor([0.1, 0.5, 0.98], dtype=torch.float64)
    output = chances.repeat(4000, 1).requires_grad_()
    (slopes,) = torch.autograd.grad(
        _loss(output, Meaning("multilabel", ""), ONE, torch.Generator().manual_seed(SEED)), output
    )
    slopes = slopes * 3**0.5  # of a mean over the entries
    yes, no = torch.isclose(slopes, -1 / chances), torch.isclose(slopes, 1 / (1 - chances))
    assert bool((yes ^ no).all())
    assert torch.allclose(yes.double().mean(0), chances, atol=0.03)
    certain = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = _loss(certain, Meaning("multilabel", ""), ONE, torch.Generator())
    assert all(bool(found.isfinite().all()) for found in (loss, *torch.autograd.grad(loss, certain)))


def test_only_what_turns_an_embedding_counts() -> None:
    output = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    slopes = []
    for length in (1.0, 10.0):
        loss = _loss(length * output, Meaning("embedding", ""), ONE, torch.Generator().manual_seed(SEED))
        slopes += torch.autograd.grad(loss, output)
    assert torch.allclose((slopes[0] * output).sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert float(slopes[0].norm()) > 0.1 and torch.allclose(slopes[0], slopes[1])


def test_a_mean_over_the_batch_has_no_axis() -> None:
    mean = torch.tensor(2.0, requires_grad=True)
    loss = _loss(mean, Meaning("values", ""), torch.tensor([4.0]), torch.Generator().manual_seed(SEED))
    (slope,) = torch.autograd.grad(loss, mean)
    assert abs(float(slope)) == abs(float(torch.randn((), generator=torch.Generator().manual_seed(SEED)))) / 2


def test_the_share_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(Chain().double())
    site = sites_of(model)[1]
    for share in (0.0, 0.25, 1.0):
        monkeypatch.setattr(output_weighting, "SHARE", share)
        found = weights_of(model, [site], batches(), SEED)
        assert torch.allclose(found[site.name], mixed(brute_force(model, site, batches()), share), atol=1e-5)


def test_the_seed_decides_the_labels() -> None:
    model = settled(Residual().double())
    sites = sites_of(model)
    first, again, other = (weights_of(model, sites, batches(), seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_sites_do_not_depend_on_each_other() -> None:
    model = settled(Residual().double())
    sites = sites_of(model)
    every = weights_of(model, sites, batches(), SEED)
    assert all(torch.equal(weights_of(model, [site], batches(), SEED)[site.name], every[site.name]) for site in sites)


def test_a_limited_number_of_inputs_is_looked_at() -> None:
    model = settled(Chain(4).double())
    many = batches(3, EXAMPLES // 2 - 10, side=4)
    few = [many[0], many[1], (many[2][0][:20],)]
    first, second = (weights_of(model, sites_of(model), chosen, SEED) for chosen in (many, few))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(
        torch.equal(first[name], found) for name, found in weights_of(model, sites_of(model), few[:2], SEED).items()
    )


def test_large_inputs_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(Chain(4).double())
    sites = sites_of(model)
    sizes: list[int] = []
    forward = Chain.forward
    monkeypatch.setattr(Chain, "forward", lambda self, x: [sizes.append(len(x)), forward(self, x)][1])
    monkeypatch.setattr(output_weighting, "CHUNK", 3 * 3 * 12 * 12)
    parts = output_weights(model, sites, batches(), SEED, meanings={"output": Meaning("logits", "a test")})
    assert sizes == [3, 1, 3, 1]
    assert set(parts) == {site.name for site in sites}


def test_a_site_that_is_called_by_keyword_has_weights_too() -> None:
    layers = {"stem": nn.Conv2d(3, 6, 3), "conv": nn.Conv2d(6, 5, 3)}
    plain = settled(Calls(lambda self, x: self.conv(self.stem(x)), **layers).double())
    named = settled(Calls(lambda self, x: self.conv(input=self.stem(x)), **layers).double())
    first, second = (weights_of(model, sites_of(plain), batches(), SEED) for model in (plain, named))
    assert all(torch.equal(first[name], second[name]) for name in ("stem", "conv"))


# --- models without gradients


class Stubborn(torch.autograd.Function):
    """An operator without a derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()


def for_inference(x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise ValueError("for inference only")
    return x


WITHOUT: dict[str, Callable[[Calls, Tensor], Tensor]] = {
    "refused": lambda self, x: self.last(self.first(for_inference(x))),
    "no derivative": lambda self, x: self.last(Stubborn.apply(self.first(x))),
    "numpy": lambda self, x: torch.as_tensor(self.last(self.first(x)).numpy()),
    "detached": lambda self, x: self.last(self.first(x)).detach(),
    "integers": lambda self, x: self.last(self.first(x)).argmax(1),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_that_cannot_be_differentiated_has_no_weights(name: str) -> None:
    model = Calls(WITHOUT[name], first=nn.Conv2d(3, 6, 3), last=nn.Conv2d(6, 5, 3)).double().eval()
    example = (torch.zeros(1, 3, 12, 12, dtype=torch.float64),)
    site = Site("first", sites_of(settled(Chain().double()))[0].kind, ConvSpec(3, 6, (3, 3)), ((12, 12),))
    with torch.no_grad():
        model(*example)
    assert weights_of(model, [site], batches(), SEED) == {}


def test_nothing_is_printed_where_a_graph_cannot_be_differentiated(capsys: pytest.CaptureFixture[str]) -> None:
    def forward(m: Calls, x: Tensor) -> Tensor:
        return m.last(torch.add(y := m.first(x), 1.0, out=torch.empty_like(y)))

    model = fx.symbolic_trace(Calls(forward, first=nn.Conv2d(3, 6, 3), last=nn.Conv2d(6, 5, 3)).double().eval())
    assert weights_of(model, sites_of(model), batches(), SEED) == {}
    assert capsys.readouterr() == ("", "")


def test_frozen_sites_behind_what_has_no_derivative_have_weights() -> None:
    model = settled(
        Calls(
            lambda self, x: self.last(F.relu(self.first(x.round())).detach()),
            first=nn.Conv2d(3, 6, 3), last=nn.Conv2d(6, 5, 3),
        ).double()
    ).requires_grad_(False)  # fmt: skip
    [last] = [site for site in sites_of(model) if site.name == "last"]
    found = weights_of(model, sites_of(model), batches(), SEED)
    assert set(found) == {"last"}
    assert torch.allclose(found["last"], mixed(brute_force(model, last, batches())), atol=1e-5)


def test_a_site_that_no_gradient_reaches_is_left_out() -> None:
    model = settled(
        Calls(
            lambda self, x: self.last(F.relu(self.first(x)).detach()) + self.side(x),
            first=nn.Conv2d(3, 6, 3), last=nn.Conv2d(6, 5, 3), side=nn.Conv2d(3, 5, 5),
        ).double()
    )  # fmt: skip
    assert set(weights_of(model, sites_of(model), batches(), SEED)) == {"last", "side"}


def test_outputs_that_are_not_finite_leave_no_weights() -> None:
    model = settled(Calls(lambda self, x: self.conv(x) * float("inf"), conv=nn.Conv2d(3, 5, 3)).double())
    assert weights_of(model, sites_of(model), batches(), SEED) == {}


def test_without_inputs_there_are_no_weights() -> None:
    model = settled(Residual().double())
    assert weights_of(model, sites_of(model), [], SEED) == {}


# --- groups


def test_every_group_has_its_own_root() -> None:
    model = settled(NineKinds().double())
    weights = weights_of(model, sites_of(model), batches(), SEED)
    for site in sites_of(model):
        roots = roots_of(weights, site)
        assert len(roots) == site.spec.groups
        size = site.spec.out_channels // site.spec.groups
        for group, root in enumerate(roots):
            assert root is not None
            block = slice(group * size, (group + 1) * size)
            assert torch.allclose(root.mT @ root, weights[site.name][block, block])
            assert torch.equal(root, root.triu())


def test_without_weights_there_is_no_root() -> None:
    site = next(site for site in sites_of(settled(NineKinds().double())) if site.name == "grouped")
    assert roots_of({}, site) == (None, None)


# --- what a fit makes of them


def pieces(name: str) -> tuple[SiteFit, SiteFit, Tensor]:
    """A site of a network with class scores, with and without weights; and the weights."""
    model = settled(Residual(12).double())
    sites = sites_of(model)
    weights = weights_of(model, sites, batches(16), SEED)
    calibration = Calibration(tuple(batches(6, 8)), (), "data", "a test")
    [site] = [site for site in sites if site.name == name]
    found = []
    for used in (weights, {}):
        walk = Propagation(model, trace(model), [site], calibration.fit, 1 << 30)
        found.append(SiteFit.of(walk, site, calibration, used, 0, Stopwatch()))
    return found[0], found[1], weights[name]


def weighted_error(site_fit: SiteFit, structure: Structure, option: Option, found: Fit, weights: Tensor) -> float:
    """``tr[G (W* - W') S (W* - W')^T]`` over that of a kernel of zeros."""
    target = site_fit.goals[0].target
    kernel = compose(found.kernels, structure.stages(site_fit.site.spec, option.parameters)).flatten(1)
    difference = target.kernel - kernel
    errors = [
        float(torch.einsum("oi,oj,jk,ik->", weights, d, target.covariance, d)) for d in (difference, target.kernel)
    ]
    return errors[0] / errors[1]


OPTIONS = [
    ("channel", {}, 3), ("channel", {}, 6), ("separable", {"order": "depthwise-first"}, 1),
    ("separable", {"order": "depthwise-first"}, 2), ("asymmetric", {"order": "vertical-first"}, 4),
    ("asymmetric", {"order": "horizontal-first"}, 4), ("grouped", {"groups": 2}, 2), ("cp", {}, 8),
]  # fmt: skip


@pytest.mark.parametrize("name", ["blocks.0.conv1", "blocks.1.conv2"])
def test_the_weighted_fit_has_the_lower_weighted_error(name: str, structures: dict[str, Structure]) -> None:
    weighted, plain, weights = pieces(name)
    gains = []
    for structure_name, variant, rank in OPTIONS:
        structure = structures[structure_name]
        option = Option(structure_name, tuple(sorted({**variant, "rank": rank}.items())))
        errors = [
            weighted_error(site_fit, structure, option, site_fit.fit(structure, option, iterations=100), weights)
            for site_fit in (weighted, plain)
        ]
        gains.append(errors[0] / errors[1])
        assert errors[0] <= errors[1] * (1 + 1e-4), f"{option.describe()}: {errors}"
    assert min(gains) < 0.97
    assert sum(gains) / len(gains) < 0.99


def test_what_does_not_mix_the_outputs_is_fitted_as_without_weights(structures: dict[str, Structure]) -> None:
    weighted, plain, _ = pieces("blocks.0.conv1")
    option = Option("separable", (("order", "pointwise-first"), ("rank", 2)))
    first, second = (site_fit.fit(structures["separable"], option, iterations=5) for site_fit in (weighted, plain))
    assert all(torch.equal(a, b) for a, b in zip(first.kernels, second.kernels, strict=True))
