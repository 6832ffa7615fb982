"""What a run is asked, as one value: :class:`Settings`. The Python interface, the fx pass, the command line and the stages share
it."""

from convrewrite.settings.constraints import BUDGETS, Constraints, Keep, KeepSource, check_budget, keep_of
from convrewrite.settings.flags import FLAG, Flag, flag
from convrewrite.settings.kinds import FieldKind, require_kinds
from convrewrite.settings.recovery import Recovery, RecoveryOptions
from convrewrite.settings.run import (
    GIGABYTE,
    MEMORY,
    ChoiceOptions,
    FormOptions,
    Settings,
    WorkOptions,
)

__all__ = [
    "BUDGETS",
    "FLAG",
    "GIGABYTE",
    "MEMORY",
    "ChoiceOptions",
    "Constraints",
    "FieldKind",
    "Flag",
    "FormOptions",
    "Keep",
    "KeepSource",
    "Recovery",
    "RecoveryOptions",
    "Settings",
    "WorkOptions",
    "check_budget",
    "flag",
    "keep_of",
    "require_kinds",
]
