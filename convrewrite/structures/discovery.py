"""The structures, discovered: every module in ``families``, and every entry point in the group below, holds one.

A module has its structure as the attribute ``STRUCTURE``. Another package adds one without touching this one:

    [project.entry-points."convrewrite.structures"]
    butterfly = "my_package.butterfly:STRUCTURE"
"""

from convrewrite.plugins import plugins
from convrewrite.structures import families
from convrewrite.structures.structure import Structure

ENTRY_POINTS = "convrewrite.structures"


def discover() -> dict[str, Structure]:
    """All structures by name, those of this package first."""
    return {structure.name: structure for structure in plugins(families, "STRUCTURE", ENTRY_POINTS)}
