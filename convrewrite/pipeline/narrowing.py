"""Which sites a run may rewrite, apart from what the rules say: those that the caller names, or all but those; and those that the
model only calls, on all inputs that are given."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from convrewrite.errors import UsageError
from convrewrite.graph import on_other_paths
from convrewrite.inputs import Inputs
from convrewrite.modules import copy_model
from convrewrite.rewriting import Prepared
from convrewrite.rules import SearchSpace
from convrewrite.settings import Settings

TRIED = 4
"""At most this many batches are tried for other paths: each takes several runs of the model."""


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


def without_irreplaceable(prepared: Prepared, batches: Sequence[Inputs]) -> Prepared:
    """The same, but sites of which the model asks more than to be called, on a path that some of these batches take, are kept. A
    model with a graph takes one path, and is not run."""
    if prepared.traced.whole is not None or not batches:
        return prepared
    sites = [space.site for space in prepared.search_spaces if space.reason is None]
    some = batches[:: -(-len(batches) // TRIED)]
    found = on_other_paths(copy_model(prepared.model), some, sites)
    reasons = {site.name: site.refusal for site in found if site.refusal is not None}
    spaces = tuple(
        _kept(space, reasons[space.site.name]) if space.site.name in reasons else space
        for space in prepared.search_spaces
    )
    home = prepared.home if prepared.home is None else replace(prepared.home, search_spaces=spaces)
    return replace(prepared, search_spaces=spaces, home=home)


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
