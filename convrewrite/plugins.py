"""Plug-ins: every module of a package holds one, and so does every entry point by which another package adds one."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def plugins(package: ModuleType, attribute: str, group: str) -> list[Any]:
    """The attribute of this name in every module of a package, then what the entry points of a group name."""
    from importlib.metadata import entry_points  # a tenth of the time of `--help`, which needs none

    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]
    points = sorted(entry_points(group=group), key=lambda point: point.name)
    return [*(getattr(module, attribute) for module in modules), *(point.load() for point in points)]
