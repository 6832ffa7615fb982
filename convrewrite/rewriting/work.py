"""What the stages of one run share: the model and its sites, the inputs, how to work, and whom to tell."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from convrewrite.calibration import Calibration
from convrewrite.conv import Cost
from convrewrite.graph import Lifted, Site, Traced
from convrewrite.inputs import Inputs
from convrewrite.meanings import Evaluation
from convrewrite.progress import Progress, Stopwatch
from convrewrite.rules import Rule, SearchSpace
from convrewrite.settings import Settings
from convrewrite.stored import NOTHING_KEPT, RunCache
from convrewrite.structures import Structure


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model in eval mode with its sites, what the rules allow at each, and the whole model's cost.

    ``original`` is the caller's, which never runs; ``model`` a copy of it, functional convolutions ``lifted``; ``hidden`` the
    part of the cost that a module made of an ONNX graph does not show.
    """

    original: nn.Module
    lifted: Lifted
    inputs: Inputs
    traced: Traced
    sites: tuple[Site, ...]
    totals: Cost
    rules: tuple[Rule, ...]
    structures: dict[str, Structure]
    search_spaces: tuple[SearchSpace, ...]
    hidden: Cost = field(default_factory=Cost)

    @property
    def model(self) -> nn.Module:
        """What is rewritten."""
        return self.lifted.model

    @property
    def rewritable(self) -> list[Site]:
        """The sites that may be rewritten, whatever the rules say: the same ones when a plan is made and carried out."""
        return [site for site in self.sites if site.refusal is None]


@dataclass(frozen=True, slots=True)
class Work:
    """The model and its sites, the inputs, what the result is evaluated on, the weights of the sites' outputs, how to work,
    whom to tell, and what earlier runs left."""

    prepared: Prepared
    data: Calibration
    evaluation: Evaluation
    weights: Mapping[str, Tensor]
    settings: Settings
    progress: Progress
    watch: Stopwatch
    cache: RunCache = NOTHING_KEPT
