"""Fitting several options of which some may fail: those are left out and the reason is logged, and the others are taken."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from convrewrite.errors import FitError
from convrewrite.rules import Candidate

Found = TypeVar("Found")

LOG = logging.getLogger(__name__)


def attempts(tasks: Iterable[Callable[[], Found]]) -> list[Callable[[], Found | FitError]]:
    """The same tasks, which return their FitError instead of raising it."""
    return [partial(_attempted, task) for task in tasks]


def require_one(found: Sequence[Found | FitError]) -> None:
    """Raise the first FitError where nothing else was found."""
    errors = [entry for entry in found if isinstance(entry, FitError)]
    if errors and len(errors) == len(found):
        raise errors[0]


def without_failed(candidates: Sequence[Candidate], found: Sequence[Found | FitError]) -> list[tuple[Candidate, Found]]:
    """The candidates with their results; those that failed are left out and logged."""
    kept = list[tuple[Candidate, Found]]()
    for candidate, entry in zip(candidates, found, strict=True):
        if isinstance(entry, FitError):
            LOG.info("%s: left out %s: %s", entry.site, candidate.option.describe(), entry.reason)
        else:
            kept.append((candidate, entry))
    return kept


def first_of(candidates: Sequence[Candidate], tasks: Iterable[Callable[[], Found]]) -> tuple[Candidate, Found]:
    """The first candidate whose task succeeds, with its result; later tasks are not begun. Raises FitError where all fail."""
    found = list[Found | FitError]()
    for task in attempts(tasks):
        found.append(task())
        if not isinstance(found[-1], FitError):
            break
    require_one(found)
    return without_failed(candidates[: len(found)], found)[0]


def _attempted(task: Callable[[], Found]) -> Found | FitError:
    try:
        return task()
    except FitError as error:
        return error
