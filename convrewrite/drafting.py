"""From what was asked to the options that are to be fitted: by each rule's own ratio, or by an allocation of a budget."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from convrewrite.allocation import require_reachable
from convrewrite.calibration import Calibration
from convrewrite.gating import fast_enough
from convrewrite.planning import Ask
from convrewrite.preparing import Judged, Prepared, Progress, Settings
from convrewrite.pricing import Prices
from convrewrite.proposing import Offer, offer_at
from convrewrite.scoring import Surveyed
from convrewrite.sensitivities import FAST, THOROUGH, survey
from convrewrite.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class Work:
    """What all stages of one run share: the model and its sites, the inputs, what the result is judged
    by, the weights of the sites' outputs, how to work, and whom to tell."""

    prepared: Prepared
    data: Calibration
    judged: Judged
    weights: Mapping[str, Tensor]
    settings: Settings
    progress: Progress
    watch: Stopwatch


def offers_by_ratio(prepared: Prepared, settings: Settings) -> tuple[Offer, ...]:
    """Every rule at its own ratio; options that miss a rule's ``min_latency_gain`` are left out where time is measured."""
    offers = tuple(offer_at(menu, None) for menu in prepared.menus)
    return fast_enough(offers, prices_of(prepared, settings)) if settings.measure else offers


def prices_of(prepared: Prepared, settings: Settings) -> Prices:
    """Who measures the seconds of options in this run."""
    rounds = FAST.rounds if settings.fast else THOROUGH.rounds
    return Prices(prepared.structures, settings.threads, rounds)


def survey_sites(work: Work, ask: Ask) -> tuple[Surveyed, ...]:
    """All options of all sites with their effects, and their seconds where speed counts.

    Raises PlanError for a budget that cannot be met, before any long work where counting tells.
    """
    prepared, settings = work.prepared, work.settings
    require_reachable(prepared.menus, ask.budget, prepared.totals)
    effort = FAST if settings.fast else THOROUGH
    timed = "latency" in ask.budget or (ask.for_speed and settings.measure)
    prices = prices_of(prepared, settings) if timed else None
    data = work.data
    if not data.fit and not data.held_out:  # from the weights alone: effects are those on noise
        data = replace(data, held_out=work.judged.batches)
    return survey(
        prepared.model, prepared.traced, prepared.menus, data, prepared.structures, effort=effort, prices=prices,
        weights=work.weights, seed=settings.seed, memory=settings.memory, progress=work.progress, stopwatch=work.watch,
        meanings=work.judged.meanings,
    )  # fmt: skip
