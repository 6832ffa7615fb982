"""How much a survey measures, and on how many of the inputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from convrewrite.calibration import Calibration
from convrewrite.fitting import ENOUGH_POSITIONS
from convrewrite.graph import Site
from convrewrite.inputs import Inputs

LEAST_EXAMPLES, ENOUGH = 32, 1 << 22
"""Effects are measured on held-out examples with at most the second number of numbers in all, as many as in 27 images of 3 x 224
x 224, but on the first number of examples at least."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: ``ranks`` fitted per rank range, ``measured`` of them through the rest of the model, on at most
    ``examples`` held-out inputs; ``iterations`` of refinement for each fit; ``inputs`` to fit on, None for all; more are used
    where the largest site needs them.

    At large sites, where a fit takes seconds, only ``large_ranks`` ranks of at most ``large_variants`` variants of a structure
    get a rough fit; those that compete are refined for ``large_iterations`` where few outputs make that cheap.
    """

    ranks: int = 4
    large_ranks: int = 2
    large_variants: int = 3
    measured: int = 3
    iterations: int = 10
    large_iterations: int = 40
    examples: int = 512
    inputs: int | None = None


THOROUGH = Effort()
FAST = Effort(
    ranks=2,
    large_ranks=1,
    large_variants=1,
    measured=2,
    iterations=0,
    large_iterations=10,
    examples=32,
    inputs=64,
)


def fewer(calibration: Calibration, effort: Effort, sites: Sequence[Site], batch: int | None = None) -> Calibration:
    """The calibration with as many inputs to fit on and to measure effects on as the effort allows; more to fit on where a site
    needs them for enough positions per unknown, as far as there are any. ``batch``: how many examples the model takes at a time,
    where that is not any number; both parts are whole batches of these then, and stay so."""
    fit = calibration.fit
    if effort.inputs is not None:
        fit = _first(fit, max([effort.inputs, *(_needed(site) for site in sites)]), batch)
    if not calibration.held_out:
        return replace(calibration, fit=fit)
    enough = max(LEAST_EXAMPLES, ENOUGH // calibration.held_out[0][0][0].numel())
    held_out = _first(calibration.held_out, min(effort.examples, enough), batch)
    return replace(calibration, fit=fit, held_out=held_out)


def _needed(site: Site) -> int:
    """How many examples have ``ENOUGH_POSITIONS`` for each number in a patch of the site."""
    spec = site.folded_spec
    sizes = (spec.output_size(size) for size in site.input_sizes)
    positions = sum(height * width for height, width in sizes)
    return math.ceil(ENOUGH_POSITIONS * spec.patch / max(1, positions))


def _first(batches: Sequence[Inputs], count: int, whole: int | None) -> tuple[Inputs, ...]:
    """Batches and a part of the last one, ``count`` examples in all, rounded up to a multiple of ``whole`` if that is given."""
    left = count if whole is None else math.ceil(count / whole) * whole
    found: list[Inputs] = []
    for batch in batches:
        if left > 0:
            found.append(tuple(tensor[:left] for tensor in batch))
        left -= len(batch[0])
    return tuple(found)
