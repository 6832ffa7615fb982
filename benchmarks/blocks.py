"""Candidates that touch more than one site, against what single sites offer: ``python benchmarks/blocks.py --network example``.

*Inner width*: channels between two convolutions go, those first whose patches explain least of what the second gives, and the
second is solved for anew on the patches that are left. *Dropped branch*: a residual block becomes its join, with an affine
function of every channel of the skip, or with a 1x1, both fitted to the block's output (PRACTISE, Wang et al. 2023).

Each is measured as a survey measures an option: KL on held-out calibration images with that block alone changed. Beside it
stands the least sum of effects that options of the block's two sites have at no more MACs, or no more seconds, as
``candidates.py --options-to`` wrote them; and the least total effect of a plan within a budget, with and without it.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from candidates import begin, held_out_kl, rules_with
from tabulate import tabulate
from torch import Tensor, nn

from convrewrite.conv import ConvSpec
from convrewrite.fitting.moments import Accumulator, Moments
from convrewrite.graph import Site
from convrewrite.modules import copy_model, run
from convrewrite.pipeline.run import Run
from convrewrite.planning.knapsack import Item, choose, undominated
from convrewrite.process import at_work
from convrewrite.rewriting.output_weighting import roots_of
from convrewrite.rewriting.surgery import build_conv, folded_kernel, replace_site
from convrewrite.runtime import THIS_MACHINE, OptionGraph

RESULTS = Path(__file__).parent / "results" / "blocks.json"
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Parts of the inner channels that are kept."""

RIDGE = 1e-3
"""Part of the mean variance of a patch, as the tool's own fits have it."""

BUDGETS = (0.5, 0.25, 0.15, 0.1)
"""Parts of the whole model's MACs, or of its sites' seconds, that plans are made for."""

RESOURCES = ("macs", "seconds")


@dataclass(frozen=True)
class Candidate:
    """What a block or a pair of convolutions could become, its costs and effect."""

    sites: tuple[str, str]
    kind: str
    detail: str
    macs: float
    seconds: float
    effect: float


class Pair:
    """Two convolutions, the second of which sees nothing of the first but its channels, each altered by itself."""

    def __init__(self, started: Run, first: Site, second: Site) -> None:
        self.started, self.first, self.second = started, first, second
        self.model = started.work.prepared.model
        self.kernels = [folded_kernel(self.model, site) for site in (first, second)]
        self.moments = _moments_of(started, second)
        root = roots_of(started.work.weights, second)[0]
        self.order = channels_by_worth(self.moments, len(self.kernels[0][0]), root)

    def narrowed(self, count: int) -> tuple[nn.Module, ConvSpec, ConvSpec]:
        """The model with so many inner channels, and the geometry of the two convolutions."""
        kept = self.order[:count].sort().values
        (kernel, bias), shape = self.kernels[0], self.kernels[1][0].shape
        one = replace(self.first.folded_spec, out_channels=count)
        other = replace(self.second.folded_spec, in_channels=count)
        columns = torch.arange(shape[1] * shape[2] * shape[3]).reshape(shape[1], -1)[kept].flatten()
        solved = _least_squares(self.moments, columns)
        offset = self.moments.mean_y - solved @ self.moments.mean_p[columns]
        like = self.model.get_submodule(self.first.name).weight
        assert isinstance(like, Tensor)
        model = copy_model(self.model)
        replace_site(model, self.first, build_conv(one, kernel[kept], bias[kept], like))
        replace_site(model, self.second, build_conv(other, solved.reshape(shape[0], count, *shape[2:]), offset, like))
        return model, one, other

    def candidates(self) -> list[Candidate]:
        """Every share of the inner channels."""
        found = []
        for share in SHARES:
            count = max(1, round(share * len(self.order)))
            model, one, other = self.narrowed(count)
            macs = _macs(one, self.first) + _macs(other, self.second)
            seconds = _seconds(one, self.first) + _seconds(other, self.second)
            effect = held_out_kl(self.started, model)
            names = (self.first.name, self.second.name)
            found.append(Candidate(names, "inner width", f"{count} of {len(self.order)}", macs, seconds, effect))
        return found


def channels_by_worth(moments: Moments, channels: int, root: Tensor | None) -> Tensor:
    """Inner channels, the one first whose patch explains most of the (weighted) output, then the one that explains most of
    the rest, and so on: a pivoted block Cholesky of the covariance of patches."""
    covariance = moments.cov_p.clone()
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    cross = moments.cov_yp.clone() if root is None else root @ moments.cov_yp
    size = len(covariance) // channels
    left, order = torch.ones(channels, dtype=torch.bool), []
    for _ in range(channels):
        blocks = covariance.reshape(channels, size, channels, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        wanted = cross.reshape(len(cross), channels, size).permute(1, 2, 0)
        ready = blocks + torch.eye(size, dtype=blocks.dtype) * (1e-12 + 1e-9 * blocks.diagonal(dim1=1, dim2=2).mean())
        gains = (wanted * torch.linalg.solve(ready, wanted)).sum((1, 2)).masked_fill(~left, -1)
        best = int(gains.argmax())
        order.append(best)
        left[best] = False
        rows = slice(best * size, (best + 1) * size)
        half = torch.linalg.solve(ready[best], covariance[rows])
        cross = cross - cross[:, rows] @ half
        covariance = covariance - covariance[:, rows] @ half
    return torch.tensor(order)


def _least_squares(moments: Moments, columns: Tensor) -> Tensor:
    covariance = moments.cov_p[columns][:, columns].clone()
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    return torch.linalg.solve(covariance, moments.cov_yp[:, columns].mT).mT


def _calls(started: Run, name: str) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of a module of the original, batch by batch."""
    seen: list[tuple[Tensor, Tensor]] = []
    module = started.work.prepared.model.get_submodule(name)
    hook = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    for batch in started.work.data.fit:
        run(started.work.prepared.model, batch)
    hook.remove()
    return seen


def _moments_of(started: Run, site: Site) -> Moments:
    """Of the site's inputs, and of the outputs that it has with its BatchNorm folded."""
    calls = _calls(started, site.name)
    model = started.work.prepared.model
    norm = nn.Identity() if site.batch_norm is None else model.get_submodule(site.batch_norm)
    accumulator = Accumulator(site.folded_spec, sum(y.shape[0] * y.shape[2] * y.shape[3] for _, y in calls), 0)
    with torch.no_grad():
        for x, y in calls:
            accumulator.add(x, norm(y))
    return accumulator.result()[0]


class Joined(nn.Module):
    """A block without its branch: ``relu(f(x))``."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function, self.relu = function, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.function(x))
        return y


def dropped(started: Run, first: Site, second: Site) -> list[Candidate]:
    """The block that the two convolutions are the branch of: its join fitted by an affine function of channels, and by a 1x1
    over the block's input that takes the skip's own convolution in."""
    block = first.name.rpartition(".")[0]
    calls = _joins(started, block)
    x = torch.cat([a for a, _ in calls]).double()
    y = torch.cat([b for _, b in calls]).double()
    stride = first.spec.stride
    x = x[:, :, :: stride[0], :: stride[1]]
    found = []
    rows, wanted = x.movedim(1, 3).flatten(0, 2), y.movedim(1, 3).flatten(0, 2)
    covariance = torch.cov(rows.T, correction=0)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    centred = wanted - wanted.mean(0)
    matrix = torch.linalg.solve(covariance, (rows - rows.mean(0)).T @ centred / len(rows)).mT
    matrices = [("1x1", matrix)]
    if matrix.shape[0] == matrix.shape[1] and stride == (1, 1):
        scale = ((rows - rows.mean(0)) * centred).mean(0) / covariance.diagonal()
        matrices.append(("affine", torch.diag(scale)))
    for detail, kernel in matrices:
        spec = ConvSpec(kernel.shape[1], kernel.shape[0], (1, 1), stride)
        module = build_conv(spec, kernel[:, :, None, None], wanted.mean(0) - kernel @ rows.mean(0), calls[0][0])
        model = copy_model(started.work.prepared.model)
        parent, _, name = block.rpartition(".")
        model.get_submodule(parent)[int(name)] = Joined(module).eval()  # type: ignore[index, operator]
        # The skip's own 1x1, where there is one, costs what the fitted one costs, and goes.
        own_skip = stride != (1, 1) or spec.in_channels != spec.out_channels
        free = detail == "affine" or own_skip
        macs = 0.0 if free else _macs(spec, first)
        seconds = 0.0 if free else _seconds(spec, first)
        effect = held_out_kl(started, model)
        found.append(Candidate((first.name, second.name), "dropped branch", detail, macs, seconds, effect))
    return found


def _joins(started: Run, block: str) -> list[tuple[Tensor, Tensor]]:
    """The input of a block, and what its branch and its skip add up to before the ReLU."""
    model = started.work.prepared.model
    module = model.get_submodule(block)
    with torch.no_grad():
        return [
            (x, module.bn2(module.conv2(module.relu(module.bn1(module.conv1(x))))) + module.skip(x))  # type: ignore
            for x, _ in _calls(started, block)
        ]


def _macs(spec: ConvSpec, site: Site) -> float:
    return float(sum(spec.macs(size) for size in site.input_sizes))


def _seconds(spec: ConvSpec, site: Site) -> float:
    """In the place of the site, one call."""
    graph: OptionGraph = ((spec,),)
    return THIS_MACHINE.time_options(site.folded_spec, [graph], site.input_sizes[0], 1, 15)[1][0]


Options = dict[str, list[Item]]
"""What is known of single sites: effect, MACs and seconds of every option, the site as it is among them."""


def read_options(path: Path) -> Options:
    found: Options = {}
    for row in json.loads(path.read_text()):
        kept = Item(0.0, (float(row["site_macs"]), float(row["site_seconds"] or 0)))
        items = found.setdefault(row["site"], [kept])
        items.append(Item(float(row["effect"]), (float(row["macs"]), float(row["seconds"] or 0))))
    return found


def on_one(items: Sequence[Item], resource: int) -> list[Item]:
    """The same with one cost, those that another beats left out."""
    narrow = [Item(item.effect, (item.costs[resource],)) for item in items]
    return [narrow[index] for index in undominated(narrow)]


def added(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Every combination of two sites' options."""
    sums = [Item(a.effect + b.effect, (a.costs[0] + b.costs[0],)) for a in first for b in second]
    return [sums[index] for index in undominated(sums)]


def least_effect(items: Sequence[Item], cost: float) -> float:
    return min((item.effect for item in items if item.costs[0] <= cost * (1 + 1e-9)), default=float("inf"))


def frontier(options: Options, candidates: Sequence[Candidate], resource: str) -> list[dict[str, object]]:
    """The least total effect of plans within budgets, from single sites alone and with each kind of candidate."""
    index = RESOURCES.index(resource)
    single = {name: on_one(items, index) for name, items in options.items()}
    total = sum(items[0].costs[index] for items in options.values())
    kinds = sorted({candidate.kind for candidate in candidates})
    rows: list[dict[str, object]] = []
    for part in BUDGETS:
        row: dict[str, object] = {"resource": resource, "budget": part}
        for kind in ("", *kinds):
            groups = _groups(single, [c for c in candidates if c.kind == kind], resource)
            chosen = choose(groups, [part * total])
            effect = None if chosen is None else sum(g[i].effect for g, i in zip(groups, chosen, strict=True))
            row[kind or "single sites"] = effect
        rows.append(row)
    return rows


def _groups(single: dict[str, list[Item]], candidates: Sequence[Candidate], resource: str) -> list[list[Item]]:
    """Sites that candidates join are one group; each site is in one pair at most, the first that names it."""
    groups, taken = [], set()
    for pair in dict.fromkeys(c.sites for c in candidates):
        if not taken & set(pair):
            taken |= set(pair)
            mine = [Item(c.effect, (getattr(c, resource),)) for c in candidates if c.sites == pair]
            groups.append([*added(single[pair[0]], single[pair[1]]), *mine])
    return groups + [items for name, items in single.items() if name not in taken]


def pairs_of(network: str, started: Run, options: Options) -> list[tuple[Site, Site]]:
    """The two convolutions of every block; in the plain network, of every two that follow each other."""
    sites = [site for site in started.work.prepared.sites if site.spec.kernel_size == (3, 3)]
    pairs = itertools.pairwise(sites)
    if network == "vgg":
        return [pair for pair in pairs if pair[0].name in options and pair[1].name in options]
    return [(a, b) for a, b in pairs if a.name.endswith("conv1") and b.name.endswith("conv2")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["example", "vgg"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--options-from", type=Path, required=True, help="the folder of candidates.py --options-to")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with at_work(0):
        results = [study(network, arguments.seed, arguments.options_from) for network in arguments.network]
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")


def study(network: str, seed: int, folder: Path) -> dict[str, object]:
    """All candidates of one network beside single sites' options, and the frontiers."""
    tables = {"macs": folder / f"{network}-{seed}-macs.json", "seconds": folder / f"{network}-{seed}-latency.json"}
    options = {resource: read_options(path) for resource, path in tables.items() if path.exists()}
    started = begin(network, seed, rules_with("smaller"))
    candidates: list[Candidate] = []
    for first, second in pairs_of(network, started, next(iter(options.values()))):
        candidates += Pair(started, first, second).candidates()
        if network != "vgg":
            candidates += dropped(started, first, second)
        print(tabulate(map(asdict, candidates[-8:]), floatfmt=".4g"), flush=True)
    beside = []
    for candidate in candidates:
        row = asdict(candidate)
        for resource, known in options.items():
            index = RESOURCES.index(resource)
            sums = added(*(on_one(known[name], index) for name in candidate.sites))
            row[f"single sites, {resource}"] = least_effect(sums, getattr(candidate, resource))
        beside.append(row)
    frontiers = [row for resource, known in options.items() for row in frontier(known, candidates, resource)]
    print(tabulate(beside, headers="keys", floatfmt=".4g"))
    print(tabulate(frontiers, headers="keys", floatfmt=".4g"), flush=True)
    return {"network": network, "seed": seed, "candidates": beside, "frontiers": frontiers}


if __name__ == "__main__":
    main()
