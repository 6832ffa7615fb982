"""The largest saving whose *measured* fidelity stays at what was asked: a search over plans that are really fitted.

A few hundred held-out inputs measure an agreement only to about a point. So the measured agreement is supplemented by an estimate
of lower variance: the changes of the gap between the two highest classes are taken from the held-out inputs, the gaps themselves
from all calibration inputs, whose number is several times larger. Both must hold.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from convrewrite.calibration import Calibration
from convrewrite.errors import PlanError
from convrewrite.meanings import MOST_UNEXPLAINED, Meaning
from convrewrite.modules import named_outputs, run
from convrewrite.places import in_float64
from convrewrite.planning.allocation import Allocation, FittedPlan, allocate
from convrewrite.planning.costs import Counted
from convrewrite.planning.curves import Surveyed
from convrewrite.rewriting import Rewritten
from convrewrite.runtime import measure_fidelity
from convrewrite.settings import Keep
from convrewrite.values import NEEDS_INPUTS

LOG = logging.getLogger(__name__)

TRIALS = 6
"""At most this many plans are fitted."""

NEAR = 0.03
"""The search ends when the cost that is left is known to within this part of it."""

FIRST_GUESS = {"agreement": 0.2, "error": 1.0}
"""The assumed ratio of the shortfall to the square root of the predicted effect before anything was measured: of the disagreement
of a classifier to that of its KL, and of the relative error to that of its own square."""


def search(
    surveyed: Sequence[Surveyed],
    totals: Counted,
    keep: Keep,
    attempt: Callable[[Allocation], Rewritten],
    shortfall_of: Callable[[nn.Module], float],
) -> FittedPlan:
    """The plan with the fewest MACs whose shortfall is allowed. Raises PlanError when no plan that was tried has such a
    shortfall."""
    allowed = keep.limit if keep.measure == "error" else 1 - keep.limit
    factor = FIRST_GUESS[keep.measure]
    low, high = _least_part(surveyed, totals), 1.0
    best: FittedPlan | None = None
    last: FittedPlan | None = None
    part = _cheapest(surveyed, totals, low, high, allowed / factor)
    for _ in range(TRIALS):
        allocation = allocate(surveyed, {"macs": part}, totals)
        rewritten = attempt(allocation)
        last = FittedPlan(allocation, rewritten, shortfall_of(rewritten.model))
        LOG.info("%.3f of the MACs: shortfall %.3g, allowed %.3g", allocation.part("macs"), last.loss, allowed)
        if last.loss <= allowed:
            best, high = last, part
        else:
            low = part
        if allocation.effect > 0:
            factor = last.loss / allocation.effect**0.5 if last.loss > 0 else factor / 4
        if high - low <= NEAR * high:
            break
        part = _cheapest(surveyed, totals, low, high, allowed / factor)
    if best is None:
        assert last is not None
        raise PlanError(
            f"no plan that was tried keeps a {keep}: at {last.allocation.part('macs'):.2f} of the MACs the shortfall is "
            f"{last.loss:.3g}, allowed is {allowed:.3g}; ask for less, give more calibration inputs, or use other rules"
        )
    return best


def _least_part(surveyed: Sequence[Surveyed], totals: Counted) -> float:
    saved = (
        max((entry.site.cost.macs - s.candidate.cost.macs for s in entry.options), default=0) for entry in surveyed
    )
    return 1 - sum(max(0, amount) for amount in saved) / totals.of("macs")


def _cheapest(surveyed: Sequence[Surveyed], totals: Counted, low: float, high: float, root_effect: float) -> float:
    """The part of the MACs between ``low`` and ``high`` at which the square root of the predicted effect is ``root_effect``;
    well inside the bracket, so that every trial narrows it."""
    margin = 0.1 * (high - low)
    inner_low, inner_high = low + margin, high - margin
    lower, upper = inner_low, inner_high
    for _ in range(8):
        middle = (lower + upper) / 2
        if allocate(surveyed, {"macs": middle}, totals).effect ** 0.5 > root_effect:
            lower = middle
        else:
            upper = middle
    return upper


def shortfall(
    original: nn.Module, rewritten: nn.Module, data: Calibration, keep: Keep, meanings: Mapping[str, Meaning]
) -> float:
    """How far the rewritten model falls short of the original on held-out inputs, at the worst output: the part of examples on
    which the top classes differ (or its estimate, if that is larger), or the relative error. That is at the limit, too, where so
    much of the variance of an output is lost that it hardly follows the inputs. Raises PlanError for agreement without class
    scores."""
    batches = data.held_out or data.fit
    fidelity = measure_fidelity(original, rewritten, batches, meanings)
    if keep.measure == "error":
        ignoring = (fidelity.most_unexplained / MOST_UNEXPLAINED) ** 0.5
        return max(fidelity.worst_error, keep.limit * ignoring)
    if fidelity.least_agreement is None:
        raise PlanError(_no_scores(meanings))
    return max(1 - fidelity.least_agreement, _estimate(original, rewritten, data, meanings))


def require_evaluable(data: Calibration, keep: Keep, meanings: Mapping[str, Meaning]) -> None:
    """Raise PlanError where it is clear before any long work that nothing can be measured: no inputs, or no class scores."""
    if not (data.held_out or data.fit):
        raise PlanError(NEEDS_INPUTS)
    if keep.measure == "agreement" and not any(meaning.scores for meaning in meanings.values()):
        raise PlanError(_no_scores(meanings))


def _no_scores(meanings: Mapping[str, Meaning]) -> str:
    taken = "; ".join(f"{name} was taken for {meaning.kind}: {meaning.reason}" for name, meaning in meanings.items())
    return (
        "keep: an agreement needs class scores, logits or probabilities, and no output of this model looks like them "
        f"({taken}); ask for --keep error=0.02 instead, or say which output they are (--output NAME=logits)"
    )


def _estimate(original: nn.Module, rewritten: nn.Module, data: Calibration, meanings: Mapping[str, Meaning]) -> float:
    """The part of all calibration inputs whose top class would change if its gap to the next class changed as it does on the
    held-out ones; at the worst output."""
    scored = {name: meaning for name, meaning in meanings.items() if meaning.scores}
    held = [(_scores(original, x, scored), _scores(rewritten, x, scored)) for x in (data.held_out or data.fit)]
    others = [_scores(original, batch, scored) for batch in data.fit] if data.held_out else []
    return max(_flips([(a[name], b[name]) for a, b in held], [scores[name] for scores in others]) for name in scored)


def _flips(held: Sequence[tuple[Tensor, Tensor]], others: Sequence[Tensor]) -> float:
    """The share of pairs of a gap and a change in which the change closes the gap. Rows that a mask leaves no class have no gap;
    where it leaves one class, the gap is infinite and stays so."""
    gaps, changes = [], []
    for before, after in held:
        top = before.topk(2, dim=1).indices
        gap, now = (_gaps(scores.gather(1, top)) for scores in (before, after))
        known = ~gap.isnan()
        gaps.append(gap[known])
        changes.append(torch.where(now == gap, 0.0, now - gap)[known])
    for scores in others:
        gap = _gaps(scores.topk(2, dim=1).values)
        gaps.append(gap[~gap.isnan()])
    falls = torch.cat(changes).neg().nan_to_num(nan=math.inf).sort().values
    if not len(falls):
        return 0.0
    lost = len(falls) - torch.searchsorted(falls, torch.cat(gaps), right=True)
    return float(in_float64(lost).mean()) / len(falls)


def _gaps(pairs: Tensor) -> Tensor:
    return pairs[:, 0] - pairs[:, 1]


def _scores(model: nn.Module, batch: tuple[Tensor, ...], meanings: Mapping[str, Meaning]) -> dict[str, Tensor]:
    """The scores of every output of class scores, as ``(rows, K)``."""
    outputs = named_outputs(run(model, batch))
    return {name: meaning.log_scores(in_float64(outputs[name])) for name, meaning in meanings.items()}
