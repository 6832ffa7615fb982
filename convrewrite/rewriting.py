"""Fit and replace, site by site, front to back.

At each site the proposed options are fitted to the inputs that the already rewritten prefix gives, and the one with the
least error on held-out inputs is put in place. Without inputs the stages keep their weights-only initial values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convrewrite.applying import build_conv, build_option, folded_kernel
from convrewrite.calibration import Calibration
from convrewrite.fitting import Fit, Target, fit
from convrewrite.moments import Accumulator, Moments
from convrewrite.propagation import Propagation
from convrewrite.proposing import Offer, Proposal
from convrewrite.sites import Site
from convrewrite.structure import Option, Structure, compose, initial_kernels, split_groups
from convrewrite.tracing import Traced

Progress = Callable[[str, int, int, str], None]
"""Called with a stage's name, how many of its steps are done, how many there are, and what is being done."""


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
) -> Rewritten:
    """Rewrite a copy of ``model``; ``memory`` in bytes bounds the activations that are held at once."""
    active = [offer.site for offer in offers if offer.proposals]
    batches = (*calibration.fit, *calibration.held_out)
    walk = Propagation(model, traced, active, batches, memory)
    outcomes: list[Outcome] = []
    try:
        for offer in offers:
            if not offer.proposals:
                outcomes.append(Outcome(offer.site, None, reason=offer.reason))
                continue
            done = sum(1 for outcome in outcomes if outcome.site in active)
            progress("fit", done, len(active), offer.site.name)
            outcomes.append(_rewrite_site(walk, offer, calibration, structures, seed))
            progress("fit", done + 1, len(active), _summary(outcomes[-1]))
    finally:
        walk.close()
    return Rewritten(walk.rewritten, tuple(outcomes))


def _summary(outcome: Outcome) -> str:
    if outcome.proposal is None:
        return f"{outcome.site.name}: kept"
    return f"{outcome.site.name}: {outcome.proposal.option.structure}, error {outcome.error:.2%}"


def _rewrite_site(
    walk: Propagation, offer: Offer, calibration: Calibration, structures: dict[str, Structure], seed: int
) -> Outcome:
    """Fit every proposal, put the best in place. A site whose best breaks its rule's error limit is kept."""
    site = offer.site
    kernel, bias = folded_kernel(walk.model, site)
    fits = _fit_all(walk, offer, kernel, bias, calibration, structures, seed)
    within = [
        (found, proposal)
        for found, proposal in zip(fits, offer.proposals, strict=True)
        if proposal.rule.require.max_output_error is None
        or found.held_out_error**0.5 <= proposal.rule.require.max_output_error
    ]
    if not within:
        least = min(found.held_out_error for found in fits) ** 0.5
        return Outcome(
            site, None, reason=f"every option's output error exceeds the rule's limit; the least is {least:.3g}"
        )
    best, proposal = min(within, key=lambda pair: pair[0].held_out_error)
    structure = structures[proposal.option.structure]
    stages = structure.stages(site.spec.per_group, proposal.option.parameters)
    like = walk.model.get_submodule(site.name).weight
    assert isinstance(like, Tensor)
    module = build_option(site.folded_spec, stages, proposal.option, best.kernels, best.bias, like)
    walk.replace(site, module)
    return Outcome(site, proposal, best.held_out_error**0.5)


def _fit_all(
    walk: Propagation,
    offer: Offer,
    kernel: Tensor,
    bias: Tensor,
    calibration: Calibration,
    structures: dict[str, Structure],
    seed: int,
) -> list[Fit]:
    site, options = offer.site, [proposal.option for proposal in offer.proposals]
    if calibration.kind == "weights only":
        return [weights_only(structures[option.structure], site, option, kernel, bias) for option in options]
    seen, unseen = gather(walk, site, kernel, bias, len(calibration.fit), seed)
    parts = split_groups(kernel, site.spec.groups)
    targets = [Target.from_moments(part, moments) for part, moments in zip(parts, seen, strict=True)]
    return [
        fit(structures[o.structure], site.folded_spec, o.parameters, kernel, seen, unseen, targets=targets)
        for o in options
    ]


def weights_only(structure: Structure, site: Site, option: Option, kernel: Tensor, bias: Tensor) -> Fit:
    """The initial values as they are; the error is that of the kernel, relative to its norm."""
    kernels = initial_kernels(structure, kernel, site.folded_spec, option.parameters)
    stages = structure.stages(site.spec.per_group, option.parameters)
    groups = zip(*(stage.chunk(site.spec.groups) for stage in kernels), strict=True)
    composed = torch.cat([compose(parts, stages) for parts in groups])
    error = float(((composed - kernel).norm() / kernel.norm().clamp_min(torch.finfo(kernel.dtype).tiny)) ** 2)
    return Fit(kernels, bias, error, error)


def gather(
    walk: Propagation, site: Site, kernel: Tensor, bias: Tensor, fitted_batches: int, seed: int
) -> tuple[tuple[Moments, ...], tuple[Moments, ...]]:
    """Moments of a site over the batches to fit on, and over those held out.

    The wanted output is the original's at the original's input, plus what the sum that follows lacks.
    """
    like = walk.model.get_submodule(site.name).weight
    assert isinstance(like, Tensor)
    original = build_conv(site.folded_spec, kernel, bias, like)
    accumulators: dict[bool, Accumulator] = {}
    for sample in walk.samples(site):
        with torch.no_grad():
            wanted = original(sample.original)
        if sample.lacking is not None:
            wanted = wanted + sample.lacking
        fitted = sample.batch < fitted_batches
        if fitted not in accumulators:
            batches = fitted_batches if fitted else walk.batches - fitted_batches
            positions = wanted.shape[0] * wanted.shape[2] * wanted.shape[3] * batches * len(site.input_sizes)
            accumulators[fitted] = Accumulator(site.folded_spec, positions, seed + (0 if fitted else 1))
        accumulators[fitted].add(sample.rewritten, wanted)
    seen = accumulators[True].result()
    return seen, accumulators[False].result() if False in accumulators else seen
