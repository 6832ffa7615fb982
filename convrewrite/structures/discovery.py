"""The structures, discovered: every module in ``families``, and every entry point in the group below, holds one.

A module has its structure as the attribute ``STRUCTURE``. Another package adds one without touching this one:

    [project.entry-points."convrewrite.structures"]
    butterfly = "my_package.butterfly:STRUCTURE"
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from convrewrite.structures import families
from convrewrite.structures.structure import Structure

ENTRY_POINTS = "convrewrite.structures"


def discover() -> dict[str, Structure]:
    """All structures by name, those of this package first."""
    modules = [
        importlib.import_module(f"{families.__name__}.{info.name}") for info in pkgutil.iter_modules(families.__path__)
    ]
    found: list[Structure] = [module.STRUCTURE for module in modules]
    found += [point.load() for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)]
    return {structure.name: structure for structure in found}
