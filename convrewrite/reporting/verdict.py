"""Whether a result is a success: what is wrong with it, in sentences that say what would help."""

from collections.abc import Mapping, Sequence

from convrewrite.calibration import Calibration
from convrewrite.fitting import ENOUGH_POSITIONS
from convrewrite.meanings import Fidelity, OutputFidelity
from convrewrite.planning import OVERSTEP
from convrewrite.reporting.figures import percent
from convrewrite.rewriting import Outcome
from convrewrite.runtime import Measured
from convrewrite.settings import Constraints
from convrewrite.values import beside, some_of

FEW_INPUTS = 512
"""With fewer inputs to fit on than this, more of them help."""

OVERFIT = 1.25
"""A site whose error on held-out inputs is more than this many times that on the inputs fitted on is overfitted: a quarter more
is well beyond the few percent by which two halves of the same inputs differ."""

TELLING = 0.01
"""Relative output error of a site up to which overfitting does no harm."""

OVERSPENT = 1.001
"""A budget of MACs or parameters, which are counted exactly, is missed by a result that costs more than this many times the
budget."""

ADVISED_BUDGETS = (0.7, 0.8, 0.9)
"""Parts of the MACs of which the least that is more than what a useless result has left is advised."""

FASTEST_RULE = "balanced"
"""The built-in rule that has every structure to choose from."""

NAMED = 5
"""Most sites that a warning names; of the others it gives the number."""


def useless(
    constraints: Constraints, measured: Measured, calibration: Calibration, *, fast: bool, left: float | None = None
) -> str | None:
    """Why the result does not compute the same any more, and what would help; None where it does. Where the caller set the limit
    with ``keep``, only outputs that hardly follow the inputs are beyond it. ``left``: the part of the original's MACs that is
    left."""
    outputs = measured.fidelity.outputs
    named = len(outputs) > 1
    lost = [*([] if constraints.keep else _lost(outputs, named=named)), *_unexplained(outputs, named=named)]
    if not lost:
        return None
    advice = _advice(constraints, measured.fidelity, calibration, fast, left)
    return (
        f"the result does not compute the same any more as the original: {', '.join(lost)}, {measured.fidelity_basis}; "
        f"what would help: {', or '.join(advice)}"
    )


def refused(
    constraints: Constraints,
    measured: Measured,
    lost: str | None,
    reached: Mapping[str, float | None],
    rules: Sequence[str] = (),
) -> str | None:
    """Why the result is no success, though everything ran. ``lost``: why it is useless, if it is; on random noise that is a
    warning only. ``reached``: the parts of the original's costs that are left. ``rules``: those it was made by."""
    if lost is not None and not measured.noise:
        return lost
    return (
        _too_dear(constraints, reached)
        or _too_slow(constraints, measured, rules)
        or _too_far(constraints, measured.fidelity)
    )


def few_positions(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """The sites whose fit rests on few positions, in one warning."""
    few = [
        (outcome.site.name, outcome.positions, outcome.unknowns)
        for outcome in outcomes
        if outcome.positions is not None and outcome.positions < ENOUGH_POSITIONS * outcome.unknowns
    ]
    if not few:
        return ()
    named = some_of([f"{name} ({positions} for {unknowns})" for name, positions, unknowns in few], NAMED, "site")
    return (
        f"fewer than {ENOUGH_POSITIONS} positions per unknown to fit on at {named}: what was fitted there may not hold "
        "for other inputs; give more calibration inputs",
    )


def unshown(measured: Measured) -> tuple[str, ...]:
    """In one warning that the fidelity says nothing, as the original gives one output for all inputs."""
    examples = measured.fidelity.examples
    if not measured.fidelity.constant or examples < 2:  # one input, which a file for whole batches gets several times
        return ()
    advice = (
        "give real inputs (--calib)"
        if measured.noise
        else "check that the inputs are prepared as in training, and that the model is a trained one"
    )
    return (
        f"the original gives the same outputs for all of the {examples} inputs that fidelity was measured on, "
        f"which then cannot show what is lost: {advice}",
    )


def overfitted(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """The sites whose fit holds clearly better for the inputs it was fitted on than for others, in one warning."""
    found = [
        (o.site.name, o.fit_error, o.error)
        for o in outcomes
        if o.fit_error is not None and o.error is not None and o.error > max(TELLING, OVERFIT * o.fit_error)
    ]
    if not found:
        return ()
    named = some_of([f"{name} ({percent(fit)} against {percent(error)})" for name, fit, error in found], NAMED, "site")
    return (
        "overfitted, which is a smaller output error on the inputs that were fitted on than on held-out ones, at "
        f"{named}: more calibration inputs would help there most",
    )


def unheld(constraints: Constraints, fidelity: Fidelity) -> tuple[str, ...]:
    """In one warning what is lost of outputs that the agreement which was to be kept says nothing of."""
    if constraints.keep is None or constraints.keep.measure != "agreement":
        return ()
    lost = _lost([output for output in fidelity.outputs if output.top1_agreement is None], named=True)
    if not lost:
        return ()
    return (
        f"a {constraints.keep} was to be kept, which says nothing of outputs that are no class scores: {', '.join(lost)}; what "
        "would help: to plan with --keep error=0.05, which counts every output, or with --output NAME=ignore for one that does "
        "not matter",
    )


def _lost(outputs: Sequence[OutputFidelity], *, named: bool) -> list[str]:
    """What is beyond the limits, output by output."""
    return [_told(output, figure, named) for output in outputs for figure in output.lost().items()]


def _unexplained(outputs: Sequence[OutputFidelity], *, named: bool) -> list[str]:
    """Outputs that hardly follow the inputs any more."""
    return [_told(output, figure, named) for output in outputs for figure in output.unfollowed().items()]


def _told(output: OutputFidelity, figure: tuple[str, float], named: bool) -> str:
    what, value = figure
    return f"{what}{f' of {output.name}' if named else ''} {percent(value)}"


def _advice(
    constraints: Constraints, fidelity: Fidelity, calibration: Calibration, fast: bool, left: float | None
) -> list[str]:
    """What would help. A plan is made by another command than the one that carries it out or recovers its result."""
    real = calibration.kind == "data"
    found = ["a run without --fast"] if fast else []
    if not real:
        found.append("real inputs (--calib)")
    elif calibration.fitted_on < FEW_INPUTS:
        found.append(f"more calibration inputs than the {calibration.fitted_on} that were fitted on")
    alone = " instead of a budget" if constraints.budget else ""  # beside one it is checked, and nothing more
    if constraints.keep is not None:
        found.append(f"to plan for more to be kept (--keep){alone}")
    elif calibration.kind != "weights only":
        found.append(f"to plan with --keep {_limit(fidelity)}{alone}, which saves only as much as holds")
    asked = ", ".join(f"{name}={part:g}" for name, part in constraints.budget.items())
    found.append(f"to plan with a larger budget than {asked}" if constraints.budget else f"to plan {_milder(left)}")
    return found


def _milder(left: float | None) -> str:
    """What would save less than the rules' own ratios did: a budget below what they left would only save more."""
    larger = next((part for part in ADVISED_BUDGETS if left is None or part > left), None)
    return "by rules that save less" + ("" if larger is None else f", or with a budget (--budget macs={larger:g})")


def _limit(fidelity: Fidelity) -> str:
    """The fidelity to ask for. An agreement is one of class scores, and would hold nothing of what is lost at another output, or
    where the classes agree."""
    apart = [o for o in fidelity.outputs if "top-1 agreement" not in o.lost()]
    return "error=0.05" if _lost(apart, named=False) or _unexplained(apart, named=False) else "0.98"


def _too_dear(constraints: Constraints, reached: Mapping[str, float | None]) -> str | None:
    """For what is counted: a plan may state another budget than its options have, and sites may be kept when it is carried
    out."""
    for name in ("macs", "params"):
        wanted, part = constraints.budget.get(name), reached.get(name)
        if wanted is not None and part is not None and part > OVERSPENT * wanted:
            return (
                f"asked for {name}={wanted:g}, reached {beside(wanted, part, '.4g')} of the original's; the rows of sites that "
                "were kept say why: ask for more, or make a new plan for this budget"
            )
    return None


def _too_slow(constraints: Constraints, measured: Measured, rules: Sequence[str]) -> str | None:
    latency = measured.onnx_latency
    if constraints.for_speed and latency is not None and measured.slower:
        return (
            f"the rewritten model is slower than the original: {beside(1, latency.ratio, '.2f')} of its time in "
            f"{latency.runtime}; {_faster(constraints, rules)}"
        )
    wanted = constraints.budget.get("latency")
    if wanted is not None and latency is not None and latency.ratio > OVERSTEP * wanted:
        return (
            f"asked for latency={wanted:g}, measured {beside(wanted, latency.ratio, '.2f')} of the original's time in "
            f"{latency.runtime}; ask for less, or repeat the run on a quieter machine"
        )
    return None


def _faster(constraints: Constraints, rules: Sequence[str]) -> str:
    """What would make the result faster, beyond what was asked already."""
    if "latency" in constraints.budget:
        return "ask for less latency, or repeat the run on a quieter machine"
    rule = "" if FASTEST_RULE in rules else f"--rule {FASTEST_RULE} "
    return f"plan with {rule}--budget latency=0.6, or with --any-speed if time does not matter"


def _too_far(constraints: Constraints, fidelity: Fidelity) -> str | None:
    keep, agreement = constraints.keep, fidelity.least_agreement
    if keep is None or keep.allows(agreement, fidelity.worst_error):
        return None
    measured = fidelity.worst_error if keep.measure == "error" or agreement is None else agreement
    advice = "give the budget more room" if constraints.budget else "make a new plan, with more inputs"
    return f"asked to keep a {keep}, measured {beside(keep.limit, measured, '.6g')}; {advice}"
