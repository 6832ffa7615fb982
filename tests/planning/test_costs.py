"""What is counted, and what is timed too."""

import pytest

from convrewrite.conv import Cost
from convrewrite.errors import PlanError
from convrewrite.planning.costs import Counted, Timed, seconds_of

COST = Cost(parameters=3, macs=7)


def test_every_resource_has_its_amount() -> None:
    timed = Timed(COST, 0.5)
    assert [timed.of(resource) for resource in ("macs", "params", "latency")] == [7, 3, 0.5]
    assert [Counted(COST).of(resource) for resource in ("macs", "params")] == [7, 3]


def test_what_nobody_measured_is_an_error_that_says_so() -> None:
    with pytest.raises(PlanError, match="expected measured times, found none"):
        Counted(COST).of("latency")
    assert (seconds_of(Counted(COST)), seconds_of(Timed(COST, 0.5))) == (None, 0.5)
