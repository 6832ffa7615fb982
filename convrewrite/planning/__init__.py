"""Choose one option for every site. Touches no model but to fit what it tries."""

from convrewrite.planning.allocation import Allocation
from convrewrite.planning.choice import Choice, Planner
from convrewrite.planning.fidelity_budget import require_evaluable
from convrewrite.planning.plan import (
    OVERSTEP,
    Considered,
    Fingerprint,
    Plan,
    PlannedOption,
    PlannedSite,
    planned_structure,
)
from convrewrite.planning.planned import shortlists_of, with_kept, with_outputs

__all__ = [
    "OVERSTEP",
    "Allocation",
    "Choice",
    "Considered",
    "Fingerprint",
    "Plan",
    "PlannedOption",
    "PlannedSite",
    "Planner",
    "planned_structure",
    "require_evaluable",
    "shortlists_of",
    "with_kept",
    "with_outputs",
]
