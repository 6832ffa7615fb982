"""The forms, discovered: every module in ``kinds``, and every entry point in the group below, holds one.

A module has its form's type as the attribute ``EXPORT``, which is called without arguments. Another package adds one without
touching this one:

    [project.entry-points."convrewrite.exports"]
    tflite = "my_package.tflite:EXPORT"
"""

from collections.abc import Iterable, Sequence

from convrewrite.errors import UsageError
from convrewrite.escaping import innermost_cause
from convrewrite.exports import kinds
from convrewrite.exports.export import Export
from convrewrite.plugins import plugins
from convrewrite.process import quiet
from convrewrite.values import near, shown

ENTRY_POINTS = "convrewrite.exports"


def kinds_of_exports() -> dict[str, Export]:
    """All forms by their names, those of this package first."""
    return {export.name: export for export in (kind() for kind in plugins(kinds, "EXPORT", ENTRY_POINTS))}


def named_exports(names: str | Sequence[str]) -> tuple[Export, ...]:
    """The forms of these names, each once, text being one name; their packages are known to be usable.

    Raises UsageError for a name that is not known, and for a package that is missing or cannot be used.
    """
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Iterable):
        raise UsageError(f'export: expected names one by one, as ["openvino"], found {shown(names)}')
    known, found = kinds_of_exports(), list[Export]()
    for name in dict.fromkeys(names):
        if name not in known:
            raise UsageError(f"export: expected one of {', '.join(known)}, found {shown(name)}{near(name, known)}")
        export = known[name]
        try:
            with quiet():
                export.version()
        except ModuleNotFoundError as error:
            raise UsageError(
                f"export {name}: needs the package {export.package}, which is not installed here "
                f"({error.name or error} is missing); pip install {export.package}"
            ) from error
        except Exception as error:  # a package that was built for another version of torch may raise anything
            raise UsageError(
                f"export {name}: the package {export.package} is installed here, and cannot be used: {innermost_cause(error)}; "
                "install a version that fits the torch that is here"
            ) from error
        found.append(export)
    return tuple(found)


def file_names() -> frozenset[str]:
    """Names of all files that the forms write."""
    return frozenset(name for export in kinds_of_exports().values() for name in export.files)
