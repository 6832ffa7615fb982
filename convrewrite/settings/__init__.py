"""What a run is asked, as one value: :class:`Settings`. The Python interface, the fx pass, the command line and the stages share
it."""

from convrewrite.settings.constraints import Constraints, Keep, check_budget, keep_of
from convrewrite.settings.flags import FLAG, Flag, flag
from convrewrite.settings.recovery import Recovery, RecoveryOptions
from convrewrite.settings.run import ChoiceOptions, Settings, SettingsOptions, WorkOptions

__all__ = [
    "FLAG",
    "ChoiceOptions",
    "Constraints",
    "Flag",
    "Keep",
    "Recovery",
    "RecoveryOptions",
    "Settings",
    "SettingsOptions",
    "WorkOptions",
    "check_budget",
    "flag",
    "keep_of",
]
