"""Fit and replace, site by site, front to back.

At each site the proposed options are fitted to the inputs that the already rewritten prefix gives, refitted to what a ReLU
lets through where only that sees the output, and the one with the least error on held-out inputs is put in place. Without
inputs the stages keep their weights-only initial values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from convrewrite.propagation import Propagation
from convrewrite.proposing import Offer, Proposal
from convrewrite.sites import Site
from convrewrite.work import Work
from convrewrite.workpiece import UNREACHED, Workpiece, require_memory


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one site: the option and its relative output error, or the reason why it is kept.

    ``positions``: how many of its inputs' patches the option was fitted on; None without inputs.
    """

    site: Site
    proposal: Proposal | None
    error: float | None = None
    reason: str | None = None
    positions: int | None = None

    @property
    def unknowns(self) -> int:
        """Numbers in a patch of one group: what a filter of the site has to be told from its positions."""
        _, channels, height, width = self.site.spec.kernel_shape
        return channels * height * width


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The rewritten copy and one outcome per site."""

    model: nn.Module
    outcomes: tuple[Outcome, ...]


def rewrite(work: Work, offers: Sequence[Offer]) -> Rewritten:
    """Rewrite a copy of the model; the memory of the settings bounds activations and moments together."""
    prepared, data, memory = work.prepared, work.data, work.settings.memory
    active = [offer.site for offer in offers if offer.proposals]
    if data.kind != "weights only":
        require_memory(active, memory)
    walk = Propagation(prepared.model, prepared.traced, active, (*data.fit, *data.held_out), memory)
    outcomes: list[Outcome] = []
    try:
        for offer in offers:
            if not offer.proposals:
                outcomes.append(Outcome(offer.site, None, reason=offer.reason))
                continue
            done = sum(1 for outcome in outcomes if outcome.site in active)
            work.progress("fit", done, len(active), offer.site.name)
            outcomes.append(_rewrite_site(walk, offer, work))
            work.progress("fit", done + 1, len(active), _summary(outcomes[-1]))
    finally:
        walk.close()
    return Rewritten(walk.rewritten, tuple(outcomes))


def _summary(outcome: Outcome) -> str:
    if outcome.proposal is None:
        return f"{outcome.site.name}: kept"
    return f"{outcome.site.name}: {outcome.proposal.option.structure}, error {outcome.error:.2%}"


def _rewrite_site(walk: Propagation, offer: Offer, work: Work) -> Outcome:
    """Fit every proposal, put the best in place. A site where all break their rules' error limits is kept."""
    structures, watch = work.prepared.structures, work.watch
    piece = Workpiece.of(walk, offer.site, work.data, work.weights, work.settings.seed, watch)
    if not piece.reached:
        return Outcome(offer.site, None, reason=UNREACHED)
    with watch.timed("solves"), piece.solving_threads():
        fits = piece.fit_all(offer.proposals, structures)
    within = [
        (proposal, found)
        for proposal, found in fits
        if found.held_out_error**0.5 <= (proposal.rule.require.max_output_error or float("inf"))
    ]
    if not within:
        least = min(found.held_out_error for _, found in fits) ** 0.5
        reason = f"every option's output error exceeds the rule's limit; the least is {least:.3g}"
        return Outcome(offer.site, None, reason=reason)
    with watch.timed("solves"), piece.solving_threads():
        proposal, best = piece.best_of(within, structures)
    structure, option = structures[proposal.option.structure], proposal.option
    # From the weights alone no input runs through the rewritten prefix: then nothing has to be fast there.
    stand_in = piece.merged(structure, option, best) if piece.seen else None
    walk.replace(offer.site, piece.build(structure, option, best), stand_in)
    positions = piece.seen[0].count if piece.seen else None
    return Outcome(offer.site, proposal, best.held_out_error**0.5, positions=positions)
