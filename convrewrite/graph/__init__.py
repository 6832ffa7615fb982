"""Follow a model and find every convolution in it, wherever it is called."""

from convrewrite.graph.calls import SITE_TYPES, spec_of
from convrewrite.graph.finding import find, on_other_paths
from convrewrite.graph.in_place import may_change, memory_of, tensors_in
from convrewrite.graph.lifting import Lifted, lift, lift_notes, needed_lifts
from convrewrite.graph.lifts import Lift, apply_lifts
from convrewrite.graph.sites import BATCH_NORMS, Site
from convrewrite.graph.tracing import Traced, execute, given_to
from convrewrite.graph.volumes import Volume

__all__ = [
    "BATCH_NORMS",
    "SITE_TYPES",
    "Lift",
    "Lifted",
    "Site",
    "Traced",
    "Volume",
    "apply_lifts",
    "execute",
    "find",
    "given_to",
    "lift",
    "lift_notes",
    "may_change",
    "memory_of",
    "needed_lifts",
    "on_other_paths",
    "spec_of",
    "tensors_in",
]
