"""What two published methods keep of trained networks, made from their formulas with what this tool has.

    python benchmarks/papers.py [--network example resnet20 vgg] [--seed 0 1] [--macs 0.5 0.25] [--methods ...] [--results FILE]

Both fit every layer by itself to the inputs that the *original* network gives it, in the norm ``|(W - W') S^(1/2)|`` with S the
second moments of its input patches, and keep its bias. Nothing is fitted to a rewritten prefix, and outputs count alike.

- ``svd``: BALF (Gonzalez Martinez 2025, arXiv 2509.25136): a whitened SVD, ``W' = U U^T W`` with U the leading left singular
  vectors of ``W S^(1/2)``, that is a k x k to R channels and a pointwise; ranks by the energy that the squares of the singular
  values, normalised per layer, sum up to under a budget of MACs of the whole network. The paper solves that knapsack by
  Lagrangian relaxation, here it is solved exactly.
- ``tucker``, ``cp``: Kalle et al. (NeurIPS 2025, arXiv 2511.04494): Tucker-2 and CP in that norm, every layer at the same part
  of its MACs. The paper alternates least squares; here the last factor is eliminated and the others follow by L-BFGS,
  which ends no higher.
- ``tucker-energy``, ``cp-energy``: the two together, these factors with ranks by energy; more than either paper has.

A BatchNorm that follows is folded first, so that a layer's error counts as the network sees it. All 1,024 images are fitted to,
none is held out. Layers stay where the budget is met best so. Measured as ``budgets.py`` does it.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from gathered import Gathered
from judging import Judge, judge_of, told, with_networks
from scipy.optimize import LinearConstraint, milp
from tabulate import tabulate
from torch import Tensor, nn

from convrewrite.conv import Conv
from convrewrite.fitting import Accumulator, Fit, Goal, Ground, Moments, fit
from convrewrite.graph import Site, find
from convrewrite.modules import copy_model, tally
from convrewrite.rewriting import build_option, folded_kernel, replace_site
from convrewrite.structures import Option, Setting, Structure, discover, make_option, option_cost

RIDGE = 1e-9
"""Part of the mean variance of a patch: the papers have no ridge, and Cholesky factors need a trace of one."""

PARTS = (0.04, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
"""Parts of a layer's MACs at which ranks of Tucker and CP compete by energy: an SVD gives all ranks at once, these are fits."""

SURVEYED = 5
"""Iterations of L-BFGS where ranks only compete: most of the gain comes first. What is taken is fitted in full."""


@dataclass(frozen=True)
class Layer:
    """A convolution with its BatchNorm folded, kernel ``(O, C, kh, kw)`` and bias ``(O,)``; moments of its input patches."""

    site: Site
    kernel: Tensor
    bias: Tensor
    moments: Moments

    def fitted(self, structure: Structure, setting: Setting, iterations: int | None = None) -> Fit:
        """Factors of this rank, no bias but the layer's own."""
        seen = [self.moments]
        goal = Goal.of(Ground.of(self.kernel, self.moments).target(RIDGE, 0.0))
        return fit(structure, self.site.spec, setting, [goal], seen, seen, iterations)

    def macs(self, structure: Structure, setting: Setting) -> int:
        stages = structure.stages(self.site.spec, setting)
        return option_cost(self.site.folded_spec, stages, self.site.input_sizes).macs

    def energies(self) -> Tensor:
        """The squares of the singular values of ``W S^(1/2)``, the largest first, over their sum."""
        flat = self.kernel.flatten(1)
        squares = torch.linalg.eigvalsh(flat @ self.moments.cov_p @ flat.T).flip(0).clamp_min(0)
        return squares / squares.sum()


@dataclass(frozen=True)
class Chosen:
    """What a layer becomes: the rank of a structure."""

    layer: Layer
    structure: Structure
    setting: Setting


@torch.no_grad()
def layers_of(model: nn.Module, images: Tensor) -> list[Layer]:
    """All convolutions but the first, with moments gathered in one pass through the original network."""
    sites = [site for site in find(model, (images[:1],))[2] if site.refusal is None and not site.is_stem]
    gathering = {}
    for site in sites:
        height, width = site.spec.output_size(site.input_sizes[0])
        gathering[site.name] = Accumulator(site.spec, len(images) * height * width, 0)
    folded = {site.name: folded_kernel(model, site) for site in sites}

    def gather(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            gathering[name].add(inputs[0], output)

        return hook

    handles = [model.get_submodule(site.name).register_forward_hook(gather(site.name)) for site in sites]
    for batch in images.split(128):
        model(batch)
    for handle in handles:
        handle.remove()
    return [_layer(site, *folded[site.name], gathering[site.name].result()[0].about_zero()) for site in sites]


def _layer(site: Site, kernel: Tensor, bias: Tensor, about_zero: Moments) -> Layer:
    """The output that is wanted is the folded convolution's without its bias: what its kernel makes of the patches."""
    flat = kernel.flatten(1)
    through = flat @ about_zero.cov_p
    power = (through * flat).sum(1)
    return Layer(site, kernel, bias, replace(about_zero, cov_yp=through, var_y=power, mean_y=torch.zeros_like(bias)))


def by_energy(layers: Sequence[Layer], options: Sequence[Mapping[Chosen, float]], limit: int) -> list[Chosen | None]:
    """The choice with the most energy in sum, every layer's own normalised to one, within ``limit`` MACs of these layers.

    ``options`` of a layer: the part of the energy that each loses. None where the layer stays.
    """
    items = [(i, option) for i, losses in enumerate(options) for option in (None, *losses)]
    lost = [0.0 if option is None else options[i][option] for i, option in items]
    macs = [
        layers[i].site.cost.macs if option is None else option.layer.macs(option.structure, option.setting)
        for i, option in items
    ]
    one_each = np.array([[float(i == index) for i, _ in items] for index in range(len(layers))])
    within = LinearConstraint(np.array([macs]) / limit, -np.inf, 1)
    found = milp(
        lost, constraints=[LinearConstraint(one_each, 1, 1), within], integrality=np.ones(len(items), np.int64)
    )
    if found.x is None:
        raise SystemExit(
            f"expected a budget of at least what the lowest ranks take, found {limit:,} MACs; ask for more"
        )
    return [option for (_, option), taken in zip(items, found.x, strict=True) if taken > 0.5]


class Method:
    """Chooses ranks for one network; what was surveyed for a budget serves the next."""

    def __init__(self, name: str, layers: Sequence[Layer]) -> None:
        structure, _, self._by = name.partition("-")
        self._structure = discover()["channel" if structure == "svd" else structure]
        self._layers = layers
        self._surveyed: list[dict[Chosen, float]] = []
        self._name = name

    def choose(self, limit: int) -> list[Chosen | None]:
        """What every layer becomes within ``limit`` MACs of all of them."""
        if self._name in ("tucker", "cp"):
            return self._alike(limit)
        if not self._surveyed:
            survey = self._spectrum if self._name == "svd" else self._tried
            self._surveyed = [survey(layer) for layer in self._layers]
        return by_energy(self._layers, self._surveyed, limit)

    def _alike(self, limit: int) -> list[Chosen | None]:
        """The largest part of their own MACs that all layers can have."""
        for thousandths in range(1000, 0, -1):
            found = [self._largest(layer, thousandths / 1000) for layer in self._layers]
            if sum(o.layer.macs(o.structure, o.setting) for o in found) <= limit:
                return list(found)
        raise SystemExit(
            f"expected a budget of at least what rank 1 takes everywhere, found {limit:,} MACs; ask for more"
        )

    def _largest(self, layer: Layer, part: float) -> Chosen:
        """The highest rank within this part of the layer's MACs, at least 1."""
        rank, most = 1, self._structure.full_rank(layer.site.spec, {})
        while rank < most and layer.macs(self._structure, {"rank": rank + 1}) <= part * layer.site.cost.macs:
            rank += 1
        return Chosen(layer, self._structure, _Setting(rank=rank))

    def _spectrum(self, layer: Layer) -> dict[Chosen, float]:
        left = 1 - layer.energies().cumsum(0)
        return {
            Chosen(layer, self._structure, _Setting(rank=rank)): max(0.0, float(left[rank - 1]))
            for rank in range(1, len(left) + 1)
            if layer.macs(self._structure, {"rank": rank}) < layer.site.cost.macs
        }

    def _tried(self, layer: Layer) -> dict[Chosen, float]:
        ranks = dict.fromkeys(self._largest(layer, part) for part in PARTS)
        return {o: layer.fitted(o.structure, o.setting, SURVEYED).unexplained for o in ranks}


class _Setting(dict[str, int | str]):
    """A setting that can be a part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def carried_out(model: nn.Module, chosen: Sequence[Chosen | None]) -> nn.Module:
    """A copy of the network with every chosen layer fitted and put in place."""
    rewritten = copy_model(model)
    for option in chosen:
        if option is None:
            continue
        layer, site = option.layer, option.layer.site
        iterations = 0 if option.structure.name == "channel" else None  # the SVD is the optimum in closed form
        found = layer.fitted(option.structure, option.setting, iterations)
        conv = rewritten.get_submodule(site.name)
        assert isinstance(conv, Conv)
        stages = option.structure.stages(site.spec, option.setting)
        how: Option = make_option(option.structure, site.spec, option.setting)
        replace_site(
            rewritten, site, build_option(site.folded_spec, stages, how, found.kernels, layer.bias, conv.weight)
        )
    return rewritten


class Network:
    """A network, its layers, and the methods on it; made when a row is not there yet."""

    def __init__(self, name: str, seed: int) -> None:
        self.judge: Judge = judge_of(name, seed)
        calibration = self.judge.calibration("data")
        images = torch.cat([batch[0] for batch in (*calibration.fit, *calibration.held_out)])
        self.layers = layers_of(self.judge.model, images)
        self.total = tally(self.judge.model, self.judge.inputs).macs
        self._methods: dict[str, Method] = {}

    def row(self, method: str, part: float) -> dict[str, Any]:
        started = time.perf_counter()
        rest = self.total - sum(layer.site.cost.macs for layer in self.layers)
        known = self._methods.setdefault(method, Method(method, self.layers))
        model = carried_out(self.judge.model, known.choose(int(part * self.total) - rest))
        seconds = round(time.perf_counter() - started, 1)
        macs = tally(model, self.judge.inputs).macs / self.total
        return {"macs": round(macs, 6), **self.judge.found(model), "seconds": seconds}


METHODS = ("svd", "tucker", "cp", "tucker-energy", "cp-energy")


@lru_cache(maxsize=1)
def network_of(name: str, seed: int) -> Network:
    return Network(name, seed)


def measure(name: str, seed: int, method: str, part: float) -> dict[str, Any]:
    return network_of(name, seed).row(method, part)


def rows(gathered: Gathered, name: str, seed: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for method in arguments.methods:
        for part in arguments.macs:
            asked = {"network": name, "seed": seed, "method": method, "asked": part}
            yield asked | gathered.row(asked, partial(measure, name, seed, method, part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_networks(parser)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    gathered = Gathered(arguments.results)
    found = [
        row
        for network in arguments.network
        for seed in arguments.seed
        for row in rows(gathered, network, seed, arguments)
    ]
    keys = "network seed method asked macs top1 lost agreement kl seconds"
    headers = ("network", "seed", "method", "asked", "MACs", "top-1", "lost", "agreement", "KL", "s")
    print(tabulate([told(row, keys) for row in found], headers, disable_numparse=True))


if __name__ == "__main__":
    main()
