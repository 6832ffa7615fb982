"""What a module in a site's place does to the model's outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from convrewrite.calibration import Calibration
from convrewrite.graph import Site
from convrewrite.meanings import Meaning, effect_of
from convrewrite.modules import kept_outputs, named_outputs
from convrewrite.planning.effort import ENOUGH
from convrewrite.rewriting import Propagation

DEAR = 6e12
"""Above this product (MACs of the model, number of its sites, number of inputs that effects are measured on) all of a site's
options are scored by the effects of one structure. VGG-16 in full stays below it, ResNet-101 with ``FAST`` does not."""

FEW = 64
"""Fewest examples that effects are measured on. A classifier is sure of most examples, and damage shows on the few others only.
Planned to a quarter of its MACs from 6 to 16 held-out images and one rank per structure, a plain Fashion-MNIST network lost 12.1,
14.4 and 0.8 points (32, 64 and 128 inputs in all); from 32 to 64 images and two ranks it lost 0.5, 0.9 and 0.7."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """The original's outputs on the batches that effects are measured on; ``long``: measuring one effect takes a good while;
    ``dear``: measuring all of them does, as there are many sites."""

    walk: Propagation
    batches: tuple[int, ...]
    originals: tuple[dict[str, Tensor], ...]
    meanings: Mapping[str, Meaning]
    long: bool = False
    dear: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        walk: Propagation,
        calibration: Calibration,
        meanings: Mapping[str, Meaning],
        sites: Sequence[Site] = (),
        least: int = FEW,
    ) -> "Evaluator":
        """Measures on held-out inputs where there are any; where they are few, also on some of the inputs that are fitted on.

        ``sites``: those whose options will be evaluated, to estimate how long that takes; ``least`` examples are used, unless
        there are fewer or they are large."""
        all_batches = (*calibration.fit, *calibration.held_out)
        batches = _measured_on(calibration, least)
        originals = tuple(kept_outputs(model, all_batches[index]) for index in batches)
        examples = sum(len(all_batches[index][0]) for index in batches)
        numbers = sum(all_batches[index][0].numel() for index in batches)
        macs = examples * len(sites) * sum(site.cost.macs for site in sites)
        return cls(walk, tuple(batches), originals, meanings, numbers > ENOUGH, macs > DEAR)

    def effect(self, site: Site, module: nn.Module) -> float:
        """The effect J of a module in the site's place."""
        outputs = self.walk.outputs(site, module, self.batches)
        return effect_of(zip(self.originals, map(named_outputs, outputs), strict=True), self.meanings)


def _measured_on(calibration: Calibration, least: int) -> list[int]:
    """Indices of the batches to measure on, where held-out batches are numbered after the others: all held-out ones, and as many
    of the others as it takes to reach ``least`` examples, or ``ENOUGH`` numbers if these are reached before."""
    fit, held_out = calibration.fit, calibration.held_out
    if not held_out:
        return list(range(len(fit)))
    batches, examples = list(range(len(fit), len(fit) + len(held_out))), calibration.held_out_count
    least = min(least, ENOUGH // held_out[0][0][0].numel())
    for index, batch in enumerate(fit):
        if examples >= least:
            break
        batches.append(index)
        examples += len(batch[0])
    return sorted(batches)
