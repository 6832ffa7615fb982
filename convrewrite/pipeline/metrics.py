"""A user's own measure of models, which is called on copies, so that it may change them."""

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
    """The metric of a model; None where there is no metric, or where its value is infinite or not a number.

    Raises UsageError for a metric that raises, or returns something else than a number; ``what``: what messages call the model.
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
    """The name of a metric."""
    return getattr(metric, "__name__", "metric")
