"""What a module in a site's place does to the model's outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from convrewrite.calibration import Calibration
from convrewrite.graph import Site
from convrewrite.meanings import Meaning, effect_of, tell
from convrewrite.modules import named_outputs, run
from convrewrite.planning.effort import ENOUGH
from convrewrite.rewriting import Propagation

DEAR = 6e12
"""MACs of the model times its sites and the inputs that effects are measured on: beyond that a site's options share the
effects of one structure. VGG-16 in full stays below it, ResNet-101 does not with ``FAST``."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """The original's outputs on the batches that effects are measured on; ``long``: each takes a good while; ``dear``:
    all together do, so many are the sites."""

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
        sites: Sequence[Site] = (),
        meanings: Mapping[str, Meaning] | None = None,
    ) -> "Evaluator":
        """On held-out inputs, where there are any. ``sites``: whose options will be evaluated, to know how long that takes;
        ``meanings`` of the outputs: None, they are told on these inputs."""
        all_batches = (*calibration.fit, *calibration.held_out)
        first = len(calibration.fit) if calibration.held_out else 0
        batches = range(first, len(all_batches))
        known = tell(model, [all_batches[index] for index in batches]) if meanings is None else meanings
        originals = tuple(named_outputs(run(model, all_batches[index])) for index in batches)
        examples = sum(len(all_batches[index][0]) for index in batches)
        numbers = sum(all_batches[index][0].numel() for index in batches)
        macs = examples * len(sites) * sum(site.cost.macs for site in sites)
        return cls(walk, tuple(batches), originals, known, numbers > ENOUGH, macs > DEAR)

    def effect(self, site: Site, module: nn.Module) -> float:
        """J of a module in the site's place."""
        outputs = self.walk.outputs(site, module, self.batches)
        return effect_of(zip(self.originals, map(named_outputs, outputs), strict=True), self.meanings)
