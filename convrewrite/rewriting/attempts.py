"""Fitting several options of which some may fail: those are left out and the reason is logged, and the others are taken."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from convrewrite.errors import FitError
from convrewrite.rules import Candidate

Result = TypeVar("Result")

LOG = logging.getLogger(__name__)


def attempts(tasks: Iterable[Callable[[], Result]]) -> list[Callable[[], Result | FitError]]:
    """The same tasks, which return their FitError instead of raising it."""
    return [partial(_attempted, task) for task in tasks]


def require_one(found: Sequence[Result | FitError]) -> None:
    """Raise the first FitError where nothing else was found."""
    errors = [entry for entry in found if isinstance(entry, FitError)]
    if errors and len(errors) == len(found):
        raise errors[0]


def without_failed(
    candidates: Sequence[Candidate], found: Sequence[Result | FitError]
) -> list[tuple[Candidate, Result]]:
    """The candidates with their results; those that failed are left out and logged."""
    kept = list[tuple[Candidate, Result]]()
    for candidate, entry in zip(candidates, found, strict=True):
        if isinstance(entry, FitError):
            LOG.info("%s: left out %s: %s", entry.site, candidate.option.describe(), entry.reason)
        else:
            kept.append((candidate, entry))
    return kept


def first_of(candidates: Sequence[Candidate], tasks: Iterable[Callable[[], Result]]) -> tuple[Candidate, Result]:
    """The first candidate whose task succeeds, with its result; later tasks are not begun. Raises FitError where all fail."""
    found = list[Result | FitError]()
    for task in attempts(tasks):
        found.append(task())
        if not isinstance(found[-1], FitError):
            break
    require_one(found)
    return without_failed(candidates[: len(found)], found)[0]


def _attempted(task: Callable[[], Result]) -> Result | FitError:
    try:
        return task()
    except FitError as error:
        return error
