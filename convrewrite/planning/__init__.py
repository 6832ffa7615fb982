"""Choose one option for every site. Touches no model but to fit what it tries."""

from convrewrite.planning.allocation import Allocation
from convrewrite.planning.candidates import to_time
from convrewrite.planning.choice import Choice, Planner, latency_table_of
from convrewrite.planning.effort import THOROUGH
from convrewrite.planning.fidelity_budget import require_evaluable
from convrewrite.planning.knapsack import Item, choose, undominated
from convrewrite.planning.plan import (
    OVERSTEP,
    Considered,
    Fingerprint,
    Plan,
    PlannedSite,
    planned_structure,
)
from convrewrite.planning.planned import shortlists_of, with_kept, with_outputs
from convrewrite.planning.sensitivities import survey

__all__ = [
    "OVERSTEP",
    "THOROUGH",
    "Allocation",
    "Choice",
    "Considered",
    "Fingerprint",
    "Item",
    "Plan",
    "PlannedSite",
    "Planner",
    "choose",
    "latency_table_of",
    "planned_structure",
    "require_evaluable",
    "shortlists_of",
    "survey",
    "to_time",
    "undominated",
    "with_kept",
    "with_outputs",
]
