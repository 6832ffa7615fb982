"""Fit and replace, site by site, front to back.

At each site the candidates of its shortlist are fitted to the inputs that the already rewritten prefix gives, and refitted to
what a ReLU lets through where only that sees the output; the one with the least error on held-out inputs is put in place.
Without inputs the stages keep their weights-only initial values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from convrewrite.errors import FitError
from convrewrite.graph import Site
from convrewrite.rewriting.propagation import Propagation
from convrewrite.rewriting.site_fit import UNREACHED, SiteFit, require_memory
from convrewrite.rewriting.work import Work
from convrewrite.rules import Candidate, Shortlist


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one site: the option and its relative output error, or the reason why it is kept.

    ``positions``: how many of its inputs' patches the option was fitted on, and ``fit_error`` the error on these; None
    without inputs.
    """

    site: Site
    candidate: Candidate | None
    error: float | None = None
    reason: str | None = None
    positions: int | None = None
    fit_error: float | None = None

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


def rewrite(work: Work, shortlists: Sequence[Shortlist]) -> Rewritten:
    """Rewrite a copy of the model; the memory of the settings bounds activations and moments together."""
    prepared, data, memory = work.prepared, work.data, work.settings.memory
    active = [shortlist.site for shortlist in shortlists if shortlist.candidates]
    if data.kind != "weights only":
        require_memory(active, memory)
    walk = Propagation(prepared.model, prepared.traced, active, (*data.fit, *data.held_out), memory)
    outcomes: list[Outcome] = []
    try:
        for shortlist in shortlists:
            if not shortlist.candidates:
                outcomes.append(Outcome(shortlist.site, None, reason=shortlist.reason))
                continue
            done = sum(1 for outcome in outcomes if outcome.site in active)
            work.progress("fit", done, len(active), shortlist.site.name)
            try:
                outcomes.append(_rewrite_site(walk, shortlist, work))
            except FitError as error:
                outcomes.append(Outcome(shortlist.site, None, reason=error.reason))
            work.progress("fit", done + 1, len(active), _summary(outcomes[-1]))
    finally:
        walk.close()
    return Rewritten(walk.rewritten, tuple(outcomes))


def _summary(outcome: Outcome) -> str:
    if outcome.candidate is None:
        return f"{outcome.site.name}: kept"
    return f"{outcome.site.name}: {outcome.candidate.option.structure}, error {outcome.error:.2%}"


def _rewrite_site(walk: Propagation, shortlist: Shortlist, work: Work) -> Outcome:
    """Fit every candidate, put the best in place. A site where all break their rules' error limits is kept."""
    structures, watch = work.prepared.structures, work.watch
    site_fit = SiteFit.of(walk, shortlist.site, work.data, work.weights, work.settings.seed, watch)
    if not site_fit.reached:
        return Outcome(shortlist.site, None, reason=UNREACHED)
    with watch.timed("solves"), site_fit.solving_threads():
        fits = site_fit.fit_all(shortlist.candidates, structures)
    within = [
        (candidate, found)
        for candidate, found in fits
        if found.error <= (candidate.rule.require.max_output_error or float("inf"))
    ]
    if not within:
        least = min(found.error for _, found in fits)
        reason = f"every option's output error exceeds the rule's limit; the least is {least:.3g}"
        return Outcome(shortlist.site, None, reason=reason)
    with watch.timed("solves"), site_fit.solving_threads():
        candidate, best = site_fit.best_of(within, structures)
    structure, option = structures[candidate.option.structure], candidate.option
    # From the weights alone no input runs through the rewritten prefix: then nothing has to be fast there.
    stand_in = site_fit.merged(structure, option, best) if site_fit.seen else None
    walk.replace(shortlist.site, site_fit.build(structure, option, best), stand_in)
    positions = site_fit.seen[0].count if site_fit.seen else None
    fit_error = site_fit.fit_error(structure, option, best)
    return Outcome(shortlist.site, candidate, best.error, positions=positions, fit_error=fit_error)
