"""Which sites a run may rewrite, apart from what the rules say: those that the caller names, or all but those."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from convrewrite.errors import UsageError
from convrewrite.rewriting import Prepared
from convrewrite.rules import SearchSpace
from convrewrite.settings import Settings


def narrowed(prepared: Prepared, settings: Settings) -> Prepared:
    """The same, but sites that ``exclude`` names, or that ``only`` does not name, are kept as they are.

    Raises UsageError for a pattern that fits no site, as it would have no effect.
    """
    names = [site.name for site in prepared.sites]
    for option, patterns in (("exclude", settings.exclude), ("only", settings.only)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"{option} {pattern}: expected a site's name or a pattern of some, found none that fits; "
                    "`convrewrite analyze` lists them"
                )
    return replace(prepared, search_spaces=tuple(_narrowed(space, settings) for space in prepared.search_spaces))


def _narrowed(space: SearchSpace, settings: Settings) -> SearchSpace:
    name = space.site.name
    if (pattern := _matching(name, settings.exclude)) is not None:
        return _kept(space, f"left out by exclude={pattern}")
    if settings.only and _matching(name, settings.only) is None:
        return _kept(space, "left out: only=... names others")
    return space


def _kept(space: SearchSpace, reason: str) -> SearchSpace:
    return space if space.reason is not None else SearchSpace(space.site, (), reason)


def _matching(name: str, patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
