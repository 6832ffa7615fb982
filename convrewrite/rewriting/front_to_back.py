"""Fit and replace, site by site, front to back.

At each site the candidates of its shortlist are fitted to the inputs that the already rewritten prefix gives, and refitted to
what a ReLU lets through where nothing else uses the output; the one with the least error on held-out inputs is put in place.
Without inputs the stages keep their weights-only initial values.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import nn

from convrewrite.errors import FitError
from convrewrite.fitting import Fit
from convrewrite.rewriting.behind_relu import BehindRelu
from convrewrite.rewriting.kept_fits import KeptFits
from convrewrite.rewriting.outcomes import Outcome
from convrewrite.rewriting.propagation import Propagation
from convrewrite.rewriting.site_fit import UNREACHED, SiteFit, require_memory
from convrewrite.rewriting.work import Work
from convrewrite.rules import Shortlist

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The rewritten copy and one outcome per site."""

    model: nn.Module
    outcomes: tuple[Outcome, ...]


def rewrite(work: Work, shortlists: Sequence[Shortlist]) -> Rewritten:
    """Rewrite a copy of the model; ``work.memory`` bounds activations and moments together."""
    prepared, data = work.prepared, work.data
    active = [shortlist.site for shortlist in shortlists if shortlist.candidates]
    if data.kind != "weights only":
        require_memory(active, work.settings.memory)
    kept, outcomes, done = KeptFits(work.cache, prepared.structures), list[Outcome](), 0
    batches = (*data.fit, *data.held_out)
    with closing(Propagation(prepared.model, prepared.traced, active, batches, work.memory)) as walk:
        for shortlist in shortlists:
            if not shortlist.candidates:
                outcomes.append(Outcome(shortlist.site, None, reason=shortlist.reason))
                continue
            work.progress("fit", done, len(active), shortlist.site.name)
            outcomes.append(_outcome_at(walk, shortlist, work, kept))
            LOG.info("%s", _summary(outcomes[-1]))
            done += 1
            work.progress("fit", done, len(active), _summary(outcomes[-1]))
    return Rewritten(walk.rewritten, tuple(outcomes))


def _summary(outcome: Outcome) -> str:
    if outcome.candidate is None:
        return f"{outcome.site.name}: kept"
    return f"{outcome.site.name}: {outcome.candidate.option.structure}, error {outcome.error:.2%}"


def _outcome_at(walk: Propagation, shortlist: Shortlist, work: Work, kept: KeptFits) -> Outcome:
    """What becomes of a site, from an earlier run where that is kept; afterwards both networks are past it."""
    known = kept.find(shortlist, walk.way_to(shortlist.site))
    if known is not None:
        LOG.info("%s: fitted in an earlier run", shortlist.site.name)
        _put_again(walk, work, *known)
        return known[0]
    try:
        outcome, found = _rewrite_site(walk, shortlist, work)
    except FitError as error:
        outcome, found = Outcome(shortlist.site, None, reason=error.reason), None
    kept.keep(shortlist, outcome, found)
    return outcome


def _put_again(walk: Propagation, work: Work, outcome: Outcome, found: Fit | None) -> None:
    """Put in place what an earlier run put there."""
    if outcome.candidate is None or found is None:
        walk.pass_over(outcome.site)
        return
    site_fit, option = SiteFit.bare(walk, outcome.site, work.data, work.settings.seed), outcome.candidate.option
    structure = work.prepared.structures[option.structure]
    stand_in = None if outcome.positions is None else site_fit.merged(structure, option, found)
    walk.pass_over(outcome.site, site_fit.build(structure, option, found), stand_in)


def _none_within(errors: Sequence[float]) -> str:
    least = min((error for error in errors if not math.isnan(error)), default=None)
    if least is None:
        return "every option's output error is not a number: its inputs or outputs are too large or too small to be fitted to"
    return f"every option's output error exceeds the rule's limit; the least is {least:.3g}"


def _rewrite_site(walk: Propagation, shortlist: Shortlist, work: Work) -> tuple[Outcome, Fit | None]:
    """Fit every candidate and put the best in place. The site is kept if all of them exceed their rules' error limits."""
    structures, watch = work.prepared.structures, work.watch
    site_fit = SiteFit.of(walk, shortlist.site, work.data, work.weights, work.settings.seed, watch)
    if not site_fit.reached:
        return Outcome(shortlist.site, None, reason=UNREACHED), None
    with watch.timed("solves"):
        fits = site_fit.fit_all(shortlist.candidates, structures)
    within = [(candidate, found) for candidate, found in fits if found.error <= candidate.most_error]
    if not within:
        return Outcome(shortlist.site, None, reason=_none_within([found.error for _, found in fits])), None
    with watch.timed("solves"):
        candidate, best = BehindRelu(site_fit).best_of(within, structures)
    structure, option = structures[candidate.option.structure], candidate.option
    # From the weights alone no input runs through the rewritten prefix, so nothing has to be fast there.
    stand_in = site_fit.merged(structure, option, best) if site_fit.seen else None
    walk.replace(shortlist.site, site_fit.build(structure, option, best), stand_in)
    positions = site_fit.seen[0].count if site_fit.seen else None
    fit_error = site_fit.fit_error(structure, option, best)
    held_out = site_fit.unseen is not site_fit.seen
    return Outcome(shortlist.site, candidate, best.error, None, positions, fit_error, held_out), best
