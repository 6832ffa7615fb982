"""What a plan is made for: budgets, and the fidelity to keep."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from convrewrite import values
from convrewrite.errors import PlanError
from convrewrite.values import is_number

if TYPE_CHECKING:
    from convrewrite.meanings import Meaning

BUDGETS = ("macs", "params", "latency")


@dataclass(frozen=True, slots=True)
class Keep:
    """The fidelity that must be kept on held-out inputs: the share of examples with the same top class, or at most so much
    relative error of every output."""

    measure: Literal["agreement", "error"]
    limit: float

    def __str__(self) -> str:
        """As in a report."""
        if self.measure == "agreement":
            return f"top-1 agreement of at least {self.limit:g}"
        return f"relative output error of at most {self.limit:g}"

    def allows(self, agreement: float | None, error: float) -> bool:
        """Whether it is kept, by the least agreement of any output, None without class scores, and the largest relative error;
        a number that is not one keeps nothing."""
        if self.measure == "error":
            return error <= self.limit
        return agreement is None or agreement >= self.limit


KeepSource = float | Mapping[str, float] | Keep | None


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan is made for: parts of the whole model's costs that may be left, the fidelity to keep, or neither: then every
    rule's own ratio holds. ``outputs``: what the caller said that outputs mean; ``any_speed``: whether options may be slower than
    what they replace."""

    budget: Mapping[str, float]
    keep: Keep | None = None
    outputs: "Mapping[str, Meaning]" = field(default_factory=dict)
    any_speed: bool = False

    @property
    def by_ratio(self) -> bool:
        """Whether neither a budget nor a fidelity was asked for."""
        return not self.budget and self.keep is None

    @property
    def left(self) -> float | None:
        """The part of the network's MACs that is to be left, or of its time, which is about as much; 1 where that is open; None
        where rules' own ratios hold."""
        if self.by_ratio:
            return None
        return min((part for name, part in self.budget.items() if name != "params"), default=1.0)

    @property
    def for_speed(self) -> bool:
        """Whether the result must not be slower: always, unless the caller allows any speed and asks for no latency."""
        return not self.any_speed or "latency" in self.budget

    @property
    def for_gain(self) -> bool:
        """Whether speed is what is asked for: an option must gain time then, and not only lose none."""
        return self.for_speed and (not self.budget or "latency" in self.budget)


def keep_of(value: KeepSource) -> Keep | None:
    """``0.98`` or ``{"error": 0.02}`` as a Keep. Raises PlanError for another key or a value outside (0, 1), of a Keep too."""
    if value is None:
        return None
    if isinstance(value, Keep):
        value = {value.measure: value.limit}
    entries = dict(value) if isinstance(value, Mapping) else {"agreement": value}
    name, limit = next(iter(entries.items()), ("", 0.0))
    if len(entries) != 1 or name not in ("agreement", "error"):
        raise PlanError(
            f"keep: expected a number such as 0.98, or error=0.02, found {', '.join(map(str, entries)) or 'nothing'}"
            f"{values.near(name, ('agreement', 'error'))}"
        )
    if not is_number(limit) or not 0 < limit < 1:
        said = f"{limit:g}" if is_number(limit) else values.shown(limit)
        raise PlanError(
            f"keep: expected {name} in (0, 1), as in {'0.98' if name == 'agreement' else 'error=0.02'}, found {said}"
        )
    return Keep("agreement" if name == "agreement" else "error", float(limit))


def check_budget(budget: Mapping[str, float]) -> None:
    """Raise PlanError for an unknown budget or a value outside (0, 1)."""
    for name, value in budget.items():
        if name not in BUDGETS:
            known, near = ", ".join(BUDGETS), values.near(name, BUDGETS)
            raise PlanError(f"budget {values.shown(name)}: expected one of {known}, as in macs=0.5{near}")
        if not is_number(value) or not 0 < value < 1:
            said = f"{value:g}" if isinstance(value, float) else values.shown(value)
            raise PlanError(f"budget {name}={said}: expected a part of the original's in (0, 1), as in {name}=0.5")
