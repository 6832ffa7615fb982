"""A user's own measure of models, called on copies, so that it may do with them what it likes."""

import math
from collections.abc import Callable

from torch import nn

from convrewrite.errors import UsageError
from convrewrite.escaping import message_of
from convrewrite.modules import copy_model
from convrewrite.values import shown

Metric = Callable[[nn.Module], float]
"""Either direction may be the better one: the number is only shown."""


def measured_by(metric: Metric | None, model: nn.Module, what: str) -> float | None:
    """The metric of a model, None where there is none, or where it is infinite or no number.

    Raises UsageError for a metric that raises, or gives something else than a number; ``what`` the model is.
    """
    if metric is None:
        return None
    name = called(metric)
    try:
        found = metric(copy_model(model))
    except Exception as error:  # the caller's own code may raise anything
        raise UsageError(
            f"metric {name}: calling it with {what} raised {type(error).__name__}: {message_of(error)}; mend what that "
            "names, or sweep without a metric"
        ) from error
    try:
        number = float(found)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: a tensor of several numbers
        raise UsageError(f"metric {name}: expected a number of {what}, found {shown(found)}") from error
    return number if math.isfinite(number) else None


def called(metric: Metric) -> str:
    """What it is called."""
    return getattr(metric, "__name__", "metric")
