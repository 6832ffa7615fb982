"""What a model or a candidate costs of every resource that a budget may limit: counted, and timed where time is measured."""

from dataclasses import dataclass

from convrewrite.conv import Cost
from convrewrite.errors import PlanError


@dataclass(frozen=True, slots=True)
class Counted:
    """MACs and parameters; no time was measured."""

    cost: Cost

    def of(self, resource: str) -> float:
        """The amount of "macs", "params" or "latency". Raises PlanError for a latency that was not measured."""
        if resource == "latency":
            raise PlanError("budget latency: expected measured times, found none; ask for macs or params")
        return self.cost.macs if resource == "macs" else self.cost.parameters


@dataclass(frozen=True, slots=True)
class Timed(Counted):
    """MACs, parameters, and the seconds that were measured."""

    seconds: float

    def of(self, resource: str) -> float:
        """The amount of "macs", "params" or "latency"."""
        return self.seconds if resource == "latency" else Counted.of(self, resource)


def seconds_of(costs: Counted) -> float | None:
    """The seconds as a plan states them: None where none were measured."""
    return costs.seconds if isinstance(costs, Timed) else None
