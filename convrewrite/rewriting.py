"""Fit and replace, site by site, front to back.

At each site the proposed options are fitted to the inputs that the already rewritten prefix gives, and the one with the
least error on held-out inputs is put in place. Where only a ReLU sees the output, that one is refitted to what the ReLU
lets through. Without inputs the stages keep their weights-only initial values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convrewrite.applying import build_conv, build_option, folded_kernel
from convrewrite.calibration import Calibration
from convrewrite.fitting import LARGE, Fit, Target, effort_for, fit, refit
from convrewrite.moments import Accumulator, Block, Moments, with_outputs
from convrewrite.propagation import Propagation
from convrewrite.proposing import Offer, Proposal
from convrewrite.sites import Site
from convrewrite.stopwatch import Stopwatch
from convrewrite.structure import Option, Stage, Structure, compose, initial_kernels, split_groups
from convrewrite.tracing import Traced

Progress = Callable[[str, int, int, str], None]
"""Called with a stage's name, how many of its steps are done, how many there are, and what is being done."""

ROUNDS = 3
"""Refits to what a ReLU lets through, at most; the first one brings most of the gain."""

REFIT_ITERATIONS = 15


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one site: the option and its relative output error, or the reason why it is kept."""

    site: Site
    proposal: Proposal | None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The rewritten copy and one outcome per site."""

    model: nn.Module
    outcomes: tuple[Outcome, ...]


def rewrite(
    model: nn.Module,
    traced: Traced,
    offers: Sequence[Offer],
    calibration: Calibration,
    structures: dict[str, Structure],
    *,
    seed: int,
    memory: int,
    progress: Progress,
    stopwatch: Stopwatch | None = None,
) -> Rewritten:
    """Rewrite a copy of ``model``; ``memory`` in bytes bounds the activations that are held at once.

    ``stopwatch`` is told the seconds of forward passes, moments and solves.
    """
    active = [offer.site for offer in offers if offer.proposals]
    batches = (*calibration.fit, *calibration.held_out)
    walk = Propagation(model, traced, active, batches, memory)
    watch = stopwatch or Stopwatch()
    outcomes: list[Outcome] = []
    try:
        for offer in offers:
            if not offer.proposals:
                outcomes.append(Outcome(offer.site, None, reason=offer.reason))
                continue
            done = sum(1 for outcome in outcomes if outcome.site in active)
            progress("fit", done, len(active), offer.site.name)
            outcomes.append(_rewrite_site(walk, offer, calibration, structures, seed, watch))
            progress("fit", done + 1, len(active), _summary(outcomes[-1]))
    finally:
        walk.close()
    return Rewritten(walk.rewritten, tuple(outcomes))


def _summary(outcome: Outcome) -> str:
    if outcome.proposal is None:
        return f"{outcome.site.name}: kept"
    return f"{outcome.site.name}: {outcome.proposal.option.structure}, error {outcome.error:.2%}"


def _rewrite_site(
    walk: Propagation,
    offer: Offer,
    calibration: Calibration,
    structures: dict[str, Structure],
    seed: int,
    watch: Stopwatch,
) -> Outcome:
    """Fit every proposal, put the best in place. A site whose best breaks its rule's error limit is kept."""
    site = _SiteAtWork.of(walk, offer.site, calibration, seed, watch)
    with watch.timed("solves"), site.solving_threads():
        fits = site.fit_all(offer.proposals, structures)
    within = [
        (found, proposal)
        for proposal, found in fits
        if found.held_out_error**0.5 <= (proposal.rule.require.max_output_error or float("inf"))
    ]
    if not within:
        least = min(found.held_out_error for _, found in fits) ** 0.5
        reason = f"every option's output error exceeds the rule's limit; the least is {least:.3g}"
        return Outcome(offer.site, None, reason=reason)
    best, proposal = min(within, key=lambda pair: pair[0].held_out_error)
    structure = structures[proposal.option.structure]
    with watch.timed("solves"), site.solving_threads():
        best = site.rectify(structure, proposal.option, best)
    walk.replace(offer.site, site.build(structure, proposal.option, best))
    return Outcome(offer.site, proposal, best.held_out_error**0.5)


@dataclass(frozen=True, slots=True)
class _SiteAtWork:
    """One site with its folded kernel ``(O, C / g, kh, kw)``, its bias, and the moments of its inputs where there are any."""

    walk: Propagation
    site: Site
    kernel: Tensor
    bias: Tensor
    like: Tensor
    fitted_batches: int
    seed: int
    seen: tuple[Moments, ...] = ()
    unseen: tuple[Moments, ...] = ()
    fitted: tuple[Block, ...] = ()
    held_out: tuple[Block, ...] = ()

    @classmethod
    def of(cls, walk: Propagation, site: Site, calibration: Calibration, seed: int, watch: Stopwatch) -> "_SiteAtWork":
        kernel, bias = folded_kernel(walk.model, site)
        like = walk.model.get_submodule(site.name).weight
        assert isinstance(like, Tensor)
        bare = cls(walk, site, kernel, bias, like, len(calibration.fit), seed)
        return bare if calibration.kind == "weights only" else bare._with_moments(watch)

    @contextmanager
    def solving_threads(self) -> Iterator[None]:
        """One thread for small problems, on which several only wait for each other; more where matrices are large."""
        before = torch.get_num_threads()
        if self.patch < LARGE:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def fit_all(self, proposals: Sequence[Proposal], structures: dict[str, Structure]) -> list[tuple[Proposal, Fit]]:
        """Every proposal with its stage kernels: fitted to the inputs, or without any the initial values.

        Of large problems only the proposal that is best before refinement is refined, and alone returned.
        """
        if not self.seen:
            return [
                (p, weights_only(structures[p.option.structure], self.site, p.option, self.kernel, self.bias))
                for p in proposals
            ]
        parts = split_groups(self.kernel, self.site.spec.groups)
        targets = [Target.from_moments(part, moments) for part, moments in zip(parts, self.seen, strict=True)]

        def fitted(proposal: Proposal, iterations: int | None) -> Fit:
            structure, setting = structures[proposal.option.structure], proposal.option.parameters
            spec = self.site.folded_spec
            return fit(structure, spec, setting, self.kernel, self.seen, self.unseen, iterations, targets)

        if self.patch >= LARGE and len(proposals) > 1:
            proposals = [min(proposals, key=lambda proposal: fitted(proposal, 0).held_out_error)]
        return [(proposal, fitted(proposal, None)) for proposal in proposals]

    @property
    def patch(self) -> int:
        """Numbers in a patch of one group."""
        return self.kernel[0].numel()

    def build(self, structure: Structure, option: Option, found: Fit) -> nn.Module:
        """The module that takes the site's place."""
        stages = structure.stages(self.site.spec.per_group, option.parameters)
        return build_option(self.site.folded_spec, stages, option, found.kernels, found.bias, self.like)

    def rectify(self, structure: Structure, option: Option, found: Fit) -> Fit:
        """Refit to what the ReLU lets through, where it alone sees the output: below zero any value is as good.

        Where the original is negative, the wanted output becomes what the rewritten site gives, if that is negative too,
        else zero; a fit to these targets never raises the error behind the ReLU, since each bounds it from above and
        touches it at the present fit (majorisation; the relaxation of Zhang et al. 2016, section 2.2). Rounds go on
        while the error behind the ReLU falls on the held-out inputs.
        """
        if not self.fitted:
            return found
        best, least = found, float("inf")
        stages = structure.stages(self.site.spec.per_group, option.parameters)
        rounds = ROUNDS if self.patch < LARGE else min(ROUNDS, 1)
        effort = effort_for(self.patch, REFIT_ITERATIONS)
        for index in range(rounds + 1):
            error, moments = self._behind_relu(stages, found)
            if not error < least:
                break
            best, least = found, error
            if index < rounds:
                spec, setting = self.site.folded_spec, option.parameters
                found = refit(structure, spec, setting, self.kernel, best, moments, self.unseen, effort)
        return best

    def _with_moments(self, watch: Stopwatch) -> "_SiteAtWork":
        """Add the moments over the batches to fit on and over those held out; and where a ReLU follows, the positions.

        The wanted output is the original's at the original's input, plus what the sum that follows lacks.
        """
        original = build_conv(self.site.folded_spec, self.kernel, self.bias, self.like)
        with watch.timed("forward passes"):
            keep = self.walk.rectified(self.site)
        fitted, held_out = self._accumulator(True, keep), self._accumulator(False, keep)
        for sample in self.walk.samples(self.site):
            with watch.timed("forward passes"), torch.no_grad():
                wanted = sample.rest(sample.total(original(sample.original)))
            chosen = fitted if sample.batch < self.fitted_batches else held_out
            with watch.timed("moments"):
                chosen.add(sample.rewritten, wanted, sample.rewritten_skip)
        if self.walk.batches == self.fitted_batches:
            held_out = fitted
        seen = self._moments(fitted)
        unseen = seen if held_out is fitted else self._moments(held_out)
        blocks = tuple(tuple(accumulator.kept or ()) for accumulator in (fitted, held_out))
        return replace(self, seen=seen, unseen=unseen, fitted=blocks[0], held_out=blocks[1])

    def _moments(self, accumulator: Accumulator) -> tuple[Moments, ...]:
        found = accumulator.result()
        return found if self.site.folded_spec.bias else tuple(moments.about_zero() for moments in found)

    def _accumulator(self, fitted: bool, keep: bool) -> Accumulator:
        examples = self.walk.examples[: self.fitted_batches] if fitted else self.walk.examples[self.fitted_batches :]
        sizes = [self.site.folded_spec.output_size(size) for size in self.site.input_sizes]
        positions = sum(examples) * sum(height * width for height, width in sizes)
        return Accumulator(self.site.folded_spec, positions, self.seed + int(not fitted), keep=keep)

    def _behind_relu(self, stages: Sequence[Stage], found: Fit) -> tuple[float, tuple[Moments, ...]]:
        """The squared error behind the ReLU on held-out positions, and the moments with relaxed outputs."""
        error = sum(_squared_error(block, outputs) for block, outputs in self._outputs(stages, found, self.held_out))
        relaxed = [_relaxed(block, outputs) for block, outputs in self._outputs(stages, found, self.fitted)]
        return error, with_outputs(self.seen, self.fitted, relaxed)

    def _outputs(self, stages: Sequence[Stage], found: Fit, blocks: Sequence[Block]) -> Iterator[tuple[Block, Tensor]]:
        """What a fit gives at every position of the blocks."""
        dtype = blocks[0].patches.dtype if blocks else torch.float32
        kernel = composed_kernel(found.kernels, stages, self.site.spec.groups).to(dtype)
        weights = kernel.flatten(1).unflatten(0, (self.site.spec.groups, -1))
        bias = found.bias.to(dtype).reshape(self.site.spec.groups, 1, -1)
        for block in blocks:
            yield block, block.patches @ weights.transpose(1, 2) + bias


def _squared_error(block: Block, outputs: Tensor) -> float:
    skip = 0.0 if block.skips is None else block.skips
    difference = (block.outputs + skip).relu() - (outputs + skip).relu()
    return float(difference.square().sum(dtype=torch.float64))


def _relaxed(block: Block, outputs: Tensor) -> Tensor:
    """The wanted outputs; where the original sum is negative, those nearest to the given ones that the ReLU still stops."""
    skip = 0.0 if block.skips is None else block.skips
    wanted = block.outputs + skip
    return torch.where(wanted > 0, wanted, (outputs + skip).clamp_max(0)) - skip


def weights_only(structure: Structure, site: Site, option: Option, kernel: Tensor, bias: Tensor) -> Fit:
    """The initial values as they are; the error is that of the kernel, relative to its norm."""
    kernels = initial_kernels(structure, kernel, site.folded_spec, option.parameters)
    stages = structure.stages(site.spec.per_group, option.parameters)
    composed = composed_kernel(kernels, stages, site.spec.groups)
    error = float(((composed - kernel).norm() / kernel.norm().clamp_min(torch.finfo(kernel.dtype).tiny)) ** 2)
    return Fit(kernels, bias, error, error)


def composed_kernel(kernels: Sequence[Tensor], stages: Sequence[Stage], groups: int) -> Tensor:
    """The canonical kernel that the stages of a site amount to, all groups of the original joined."""
    per_group = zip(*(stage.chunk(groups) for stage in kernels), strict=True)
    return torch.cat([compose(parts, stages) for parts in per_group])
