"""Fitting several options of which some may fail: those are left out and the reason is logged, and the others are taken."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from convrewrite.errors import FitError
from convrewrite.fitting import Fit
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


def until_within(candidates: Sequence[Candidate], tasks: Iterable[Callable[[], Fit]]) -> list[tuple[Candidate, Fit]]:
    """The first candidates with their fits, up to one that is within its rule's error limit; later tasks are not begun.

    After one that is not, only candidates with a larger limit are tried: with many options under one limit, fitting the best
    of them is enough. Raises FitError where all that were tried fail.
    """
    tried, found, missed = list[Candidate](), list[Fit | FitError](), 0.0
    for candidate, task in zip(candidates, attempts(tasks), strict=True):
        if candidate.most_error <= missed:
            continue
        fitted = task()
        tried.append(candidate)
        found.append(fitted)
        if isinstance(fitted, FitError):
            continue
        if fitted.error <= candidate.most_error:
            break
        missed = candidate.most_error
    require_one(found)
    return without_failed(tried, found)


def _attempted(task: Callable[[], Found]) -> Found | FitError:
    try:
        return task()
    except FitError as error:
        return error
