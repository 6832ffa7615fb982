"""Replacements that are none of the package's structures, made and measured one at a time; `candidates.py` compares them.

Every one is measured as a survey measures an option: by KL on held-out calibration images, with that alone changed.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from few_inputs import calibration_images
from torch import Tensor, nn
from training import load

from convrewrite.conv import ConvSpec, Size
from convrewrite.fitting import Accumulator, Moments
from convrewrite.graph import Site
from convrewrite.meanings import effect_of
from convrewrite.modules import copy_model, named_outputs, run
from convrewrite.pipeline import Run
from convrewrite.rewriting import build_conv, folded_kernel, replace_site, roots_of
from convrewrite.rules import resolve
from convrewrite.runtime import THIS_MACHINE, OptionGraph
from convrewrite.settings import Settings

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Parts of the inner channels that are kept."""

SIZES: tuple[Size, ...] = ((1, 1), (1, 3), (3, 1))
"""What a 3 x 3 kernel is cut down to."""

RIDGE = 1e-3
"""Part of the mean variance of a patch, as in the tool's own fits."""


def begin(network: str, seed: int) -> Run:
    """A run of the rule ``balanced`` up to its survey, with the original exported and timed."""
    model, images = load(network, seed), calibration_images()
    return Run.to_plan(model, (images[:1],), resolve(["balanced"]), images, Settings(budget={"latency": 0.5}))


def held_out_kl(started: Run, model: nn.Module) -> float:
    """KL in nats from the original's classes to the rewritten model's, on all held-out calibration images."""
    original = started.work.prepared.model
    batches = started.work.data.held_out
    pairs = [(named_outputs(run(original, batch)), named_outputs(run(model, batch))) for batch in batches]
    return effect_of(pairs, started.work.evaluation.meanings)


@dataclass(frozen=True)
class Candidate:
    """What one site, or two, could become, its costs and effect."""

    sites: tuple[str, ...]
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
    """Moments of the site's inputs, and of the outputs that it has with its BatchNorm folded."""
    calls = _calls(started, site.name)
    model = started.work.prepared.model
    norm = nn.Identity() if site.batch_norm is None else model.get_submodule(site.batch_norm)
    accumulator = Accumulator(site.folded_spec, sum(y.shape[0] * y.shape[2] * y.shape[3] for _, y in calls), 0)
    with torch.no_grad():
        for x, y in calls:
            accumulator.add(x, norm(y))
    return accumulator.result()[0]


def smaller(started: Run, site: Site) -> Iterator[Candidate]:
    """The middle of the kernel alone, solved for on the patches that are left."""
    spec, model = site.folded_spec, started.work.prepared.model
    moments = _moments_of(started, site)
    like = model.get_submodule(site.name).weight
    assert isinstance(like, Tensor) and isinstance(spec.padding, tuple) and spec.kernel_size == (3, 3)
    numbers = torch.arange(spec.in_channels * 9).reshape(spec.in_channels, 3, 3)
    for height, width in SIZES:
        rows, columns = (3 - height) // 2, (3 - width) // 2
        kept = numbers[:, rows : 3 - rows, columns : 3 - columns].flatten()
        solved = _least_squares(moments, kept)
        offset = moments.mean_y - solved @ moments.mean_p[kept]
        cut = replace(
            spec, kernel_size=(height, width), padding=(spec.padding[0] - rows, spec.padding[1] - columns), bias=True
        )
        kernel = solved.reshape(spec.out_channels, spec.in_channels, height, width)
        changed = copy_model(model)
        replace_site(changed, site, build_conv(cut, kernel, offset, like))
        effect = held_out_kl(started, changed)
        detail = f"{height} x {width}"
        yield Candidate((site.name,), "smaller kernel", detail, _macs(cut, site), _seconds(cut, site), effect)


class Joined(nn.Module):
    """A block without its branch: ``relu(f(x))``."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function, self.relu = function, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.function(x))
        return y


def dropped(started: Run, first: Site, second: Site) -> list[Candidate]:
    """The block whose branch the two convolutions are, without it: its join fitted by an affine function of channels, and by a
    1x1 over the block's input, which replaces the skip's own convolution."""
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
        model.get_submodule(parent)[int(name)] = Joined(module).eval()  # type: ignore[operator]
        # The skip's own 1x1, where there is one, costs what the fitted one costs, and is dropped.
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
    """Seconds of one call in the place of the site. A convolution with fewer inputs is timed as one with fewer outputs in
    proportion, as only graphs with the same input can be timed in turns."""
    whole = site.folded_spec
    outputs = round(spec.out_channels * spec.in_channels / whole.in_channels)
    graph: OptionGraph = ((replace(spec, in_channels=whole.in_channels, out_channels=max(1, outputs)),),)
    return THIS_MACHINE.time_options(whole, [graph], site.input_sizes[0], 1, 15)[1][0]


def pairs_of(network: str, started: Run) -> list[tuple[Site, Site]]:
    """The two convolutions of every block; in the plain network, of every two that follow each other."""
    sites = [site for site in started.work.prepared.sites if site.spec.kernel_size == (3, 3)]
    active = {space.site.name for space in started.work.prepared.search_spaces if space.rank_ranges}
    pairs = itertools.pairwise(sites)
    if network == "vgg":
        return [pair for pair in pairs if pair[0].name in active and pair[1].name in active]
    return [(a, b) for a, b in pairs if a.name.endswith("conv1") and b.name.endswith("conv2")]
