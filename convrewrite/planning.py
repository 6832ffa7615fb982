"""The plan: one option per site, as a value that can be read, compared, kept and applied again; and budgets.

A budget is a part of the whole model's cost. It is met by one uniform ratio for all sites, the largest that fits.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from convrewrite.conv import Cost
from convrewrite.errors import PlanError
from convrewrite.proposing import Menu, Offer, offer_at
from convrewrite.structure import Option

BUDGETS = ("macs", "params")
STEPS = 400
"""Uniform ratios that are tried, evenly spaced in (0, 1)."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fingerprint(_Part):
    """What a plan belongs to: hashes of the names and shapes of a model's tensors, and of their values."""

    geometry: str
    weights: str

    @classmethod
    def of(cls, model: nn.Module) -> "Fingerprint":
        """The fingerprint of a model as it stands."""
        geometry, weights = hashlib.sha256(), hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            if not isinstance(tensor, torch.Tensor):
                continue
            geometry.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return cls(geometry=geometry.hexdigest(), weights=weights.hexdigest())


class PlannedOption(_Part):
    """A structure with its parameters and its lowering."""

    structure: str
    parameters: dict[str, int | str]
    lowering: str

    @classmethod
    def of(cls, option: Option) -> "PlannedOption":
        """The option as it stands in a plan."""
        return cls(structure=option.structure, parameters=option.parameters, lowering=option.lowering)

    def option(self) -> Option:
        """The option as the stages use it."""
        return Option(self.structure, tuple(sorted(self.parameters.items())), self.lowering)


class PlannedSite(_Part):
    """One site: its option, or the reason why it is kept. ``batch_norm`` names the BatchNorm folded into it."""

    name: str
    kind: str
    geometry: str
    option: PlannedOption | None
    reason: str | None = None
    batch_norm: str | None = None


class Plan(_Part):
    """One option per site of one model. Plans are written as JSON, one site after another in the order they run."""

    schema_version: Literal[1] = 1
    tool_version: str
    model: Fingerprint
    rules: tuple[str, ...]
    budget: dict[str, float]
    seed: int
    sites: tuple[PlannedSite, ...]

    def to_json(self) -> str:
        """The text of ``plan.json``."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> "Plan":
        """Read a plan; raises PlanError that names the first wrong entry."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanError(f"{source}: {where}: {first['msg']}; expected a plan written by this tool") from error

    def require_model(self, model: nn.Module, *, weights: bool) -> None:
        """Raise PlanError unless the plan was made for this model; ``weights``: for these very weights."""
        found = Fingerprint.of(model)
        if found.geometry != self.model.geometry:
            raise PlanError(
                f"the plan was made for another model: its tensors' names or shapes differ from {type(model).__name__}; "
                "give the original model the plan was made from"
            )
        if weights and found.weights != self.model.weights:
            raise PlanError("the plan was made for this architecture with other weights; make a new plan for these")


def check_budget(budget: Mapping[str, float]) -> None:
    """Raise PlanError for an unknown budget or a value outside (0, 1)."""
    for name, value in budget.items():
        if name not in BUDGETS:
            raise PlanError(f"budget {name!r}: expected one of {', '.join(BUDGETS)}, as in macs=0.5")
        if not 0 < value < 1:
            raise PlanError(f"budget {name}={value:g}: expected a part of the original's in (0, 1), as in {name}=0.5")


def offers_within(menus: Sequence[Menu], budget: Mapping[str, float], totals: Cost) -> tuple[Offer, ...]:
    """The options of every site: at the rules' own ratios, or at the largest uniform ratio that meets the budget.

    ``totals`` is the whole model's cost. Raises PlanError that says what can be reached.
    """
    if not budget:
        return tuple(offer_at(menu, None) for menu in menus)
    reachable = dict.fromkeys(budget, 1.0)
    for step in range(STEPS - 1, 0, -1):
        offers = tuple(offer_at(menu, step / STEPS) for menu in menus)
        parts = {name: _part_left(offers, name, totals) for name in budget}
        if all(parts[name] <= limit for name, limit in budget.items()):
            return offers
        reachable = {name: min(part, parts[name]) for name, part in reachable.items()}
    asked = ", ".join(f"{name}={part:g}" for name, part in budget.items())
    found = ", ".join(f"{name}={part:.3f}" for name, part in reachable.items())
    raise PlanError(
        f"budget {asked} cannot be met by these rules on this model: they reach {found} at the least; "
        "ask for more than that, or add rules (--rule balanced)"
    )


def _part_left(offers: Sequence[Offer], name: str, totals: Cost) -> float:
    """The part of the whole model's cost that is left with the most expensive proposal of every site."""
    total = _amount(totals, name)
    saved = sum(
        _amount(offer.site.cost, name) - max(_amount(proposal.cost, name) for proposal in offer.proposals)
        for offer in offers
        if offer.proposals
    )
    return (total - saved) / total if total else 1.0


def _amount(cost: Cost, budget: str) -> int:
    return cost.macs if budget == "macs" else cost.parameters
