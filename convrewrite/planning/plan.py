"""The plan: one option per site, as a value that can be read, compared, kept and applied again."""

import hashlib
import html
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from torch import nn

from convrewrite import values
from convrewrite.conv import ConvSpec, Kind
from convrewrite.errors import PlanError
from convrewrite.escaping import printable
from convrewrite.graph import Lift
from convrewrite.json_texts import each_key_once
from convrewrite.meanings import Meaning, OutputKind
from convrewrite.rules import allowed_variants
from convrewrite.settings import Constraints, check_budget, keep_of
from convrewrite.state import state_of
from convrewrite.stored import raw_bytes
from convrewrite.structures import Option, Structure, lowerings

OVERSTEP = 1.1
"""A result that measures more than this many times its budget of latency is no success. A smaller excess lies within what two
measurements of a whole model may differ by on a busy machine."""


Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class _PlanPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fingerprint(_PlanPart):
    """What a plan belongs to: hashes of the names and shapes of a model's tensors, and of their values."""

    geometry: str
    weights: str

    @classmethod
    def of(cls, model: nn.Module) -> "Fingerprint":
        """The fingerprint of a model as it stands."""
        geometry, weights = hashlib.sha256(), hashlib.sha256()
        for name, tensor in sorted(state_of(model).items()):
            if not isinstance(tensor, torch.Tensor):
                continue
            geometry.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            weights.update(raw_bytes(tensor))
        return cls(geometry=geometry.hexdigest(), weights=weights.hexdigest())

    def __str__(self) -> str:
        """As it stands in the metadata of an ONNX file."""
        return f"{self.geometry}:{self.weights}"


class PlannedOption(_PlanPart):
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


class Considered(_PlanPart):
    """An option at a site and its cost there. Where it was measured: its relative output error with only this site rewritten, and
    the effect of that on the model's outputs. ``reason``: why it was left out, if it was."""

    option: PlannedOption
    macs: Count
    parameters: Count
    seconds: Amount | None = None
    error: float | None = None
    effect: float | None = None
    reason: str | None = None


class PlannedSite(_PlanPart):
    """One site: its option, or the reason why it is kept. ``batch_norm`` names the BatchNorm folded into it.

    ``macs``, ``parameters`` and ``seconds`` are those of the site as it was.
    """

    name: str
    kind: Kind
    geometry: str
    option: PlannedOption | None
    reason: str | None = None
    batch_norm: str | None = None
    macs: Count | None = None
    parameters: Count | None = None
    seconds: Amount | None = None
    considered: tuple[Considered, ...] = ()

    @property
    def becomes(self) -> str:
        """Its option in words, or why it is kept."""
        return f"kept: {self.reason}" if self.option is None else self.option.option().describe()


class Predicted(_PlanPart):
    """What a plan promises: the sum of the effects of its sites, and the parts of the whole model's costs that are left."""

    effect: float
    macs: Amount
    params: Amount
    latency: Amount | None = None


class PlannedOutput(_PlanPart):
    """What an output was taken for, why, and how much it counts among several."""

    kind: OutputKind
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    reason: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]

    @classmethod
    def of(cls, meaning: Meaning) -> "PlannedOutput":
        """The meaning as it stands in a plan."""
        return cls(kind=meaning.kind, weight=meaning.weight, reason=meaning.reason)


class Plan(_PlanPart):
    """One option per site of one model. Plans are written as JSON, one site after another in the order they run.

    ``budget``, ``keep``, ``any_speed`` and ``seed`` are those of :class:`convrewrite.Settings`; ``outputs``: what the outputs
    were taken for when effects were measured; ``lifted``: the functional convolutions that were made modules before sites were
    found.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    model: Fingerprint
    rules: tuple[str, ...]
    budget: dict[str, float]
    keep: dict[str, float] | None = None
    any_speed: bool = False
    seed: int = Field(ge=0, le=values.LARGEST_SEED)
    predicted: Predicted | None = None
    lifted: tuple[Lift, ...] = ()
    outputs: dict[str, PlannedOutput] = Field(default_factory=dict)
    sites: tuple[PlannedSite, ...]

    @field_validator("schema_version", mode="before")
    @classmethod
    def _is_a_number(cls, version: object) -> object:
        if isinstance(version, bool):  # which equals one
            raise ValueError("Input should be 1")
        return version

    @field_validator("sites")
    @classmethod
    def _one_site_of_a_name(cls, sites: tuple[PlannedSite, ...]) -> tuple[PlannedSite, ...]:
        twice = [name for name, count in Counter(site.name for site in sites).items() if count > 1]
        if twice:
            raise ValueError(f"two sites are called {twice[0]!r}")
        return sites

    def site(self, name: str) -> PlannedSite:
        """One site; raises PlanError that lists the names when there is no such site."""
        for site in self.sites:
            if site.name == name:
                return site
        raise PlanError(f"the plan has no site {name!r}; its sites are {', '.join(site.name for site in self.sites)}")

    def _repr_html_(self) -> str:
        """How a notebook shows it: what every site becomes."""
        cells = ((site.name, site.kind, site.geometry, site.becomes) for site in self.sites)
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(printable(text))}</td>' for text in row)}</tr>" for row in cells
        )
        head = "".join(f"<th>{name}</th>" for name in ("site", "kind", "geometry", "becomes"))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def asked(self) -> Constraints:
        """What the plan was made for; raises PlanError for an invalid budget or fidelity."""
        check_budget(self.budget)
        return Constraints(self.budget, keep_of(self.keep), any_speed=self.any_speed)

    def meanings(self) -> dict[str, Meaning]:
        """What the outputs were taken for, without discrete ones, which are recognised anew."""
        return {
            name: Meaning(output.kind, output.reason, output.weight)
            for name, output in self.outputs.items()
            if output.kind != "discrete"
        }

    def to_json(self) -> str:
        """The text of ``plan.json``."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> "Plan":
        """Read a plan; raises PlanError that names the first wrong entry."""
        try:
            plan = cls.model_validate_json(text, strict=True)
            plan._require_reasons()
            each_key_once(text)
            plan.asked()
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from error
        except ValidationError as error:
            raise PlanError(f"{source}: {_wrong(error.errors()[0])}; expected a plan written by this tool") from error
        except ValueError as error:  # half of a surrogate pair, a number too long, or a key that stands twice
            raise PlanError(f"{source}: {error}; make a new plan") from error
        return plan

    def _require_reasons(self) -> None:
        for site in self.sites:
            if site.option is None and not (site.reason or "").strip():
                raise PlanError(
                    f"{site.name}: expected an option, or the reason why it is kept, found neither; make a new plan"
                )

    def require_model(self, model: nn.Module, *, weights: bool) -> None:
        """Raise PlanError unless the plan was made for this model; ``weights``: for these very weights."""
        found = Fingerprint.of(model)
        if found.geometry != self.model.geometry:
            raise PlanError(
                f"the plan was made for another model: its tensors' names, shapes or types differ from {type(model).__name__}; "
                "give the original model the plan was made from"
            )
        if weights and found.weights != self.model.weights:
            raise PlanError(
                "the plan was made for this architecture with other weights; give the original with the weights that it had, or "
                "make a new plan for these"
            )


def _wrong(details: ErrorDetails) -> str:
    """The first wrong entry: where it is, what was expected there, and what was found, unless the whole file or entry is
    wrong."""
    where = ".".join(str(part) for part in details["loc"]) or "the file"
    whole = not details["loc"] or details["type"] in ("missing", "extra_forbidden")
    return f"{where}: {details['msg']}" + ("" if whole else f", found {values.shown(details['input'])}")


def planned_structure(site: str, planned: PlannedOption, folded: ConvSpec, known: Mapping[str, Structure]) -> Structure:
    """The structure of an option of this site, whose geometry with the BatchNorm folded in is ``folded``.

    Raises PlanError for a structure that is not known or does not take this geometry, for parameters or a lowering that it does
    not have here, and for a rank out of its range: a plan may come from anywhere, and decides the size of what is built.
    """
    structure, spec = known.get(planned.structure), folded.per_group
    if structure is None:
        raise PlanError(
            f"{site}: structure {planned.structure!r} is not known; known are {', '.join(known)}; install or pass it"
        )
    refused = structure.reject(spec)
    if refused is not None:
        raise PlanError(f"{site}: the plan rewrites it, but {refused}; make a new plan")
    rank = planned.parameters.get("rank")
    variant = {key: value for key, value in planned.parameters.items() if key != "rank"}
    if variant not in [dict(one) for one in allowed_variants(structure, folded, {})]:
        raise PlanError(f"{site}: {structure.name} has no variant {variant} here; make a new plan")
    top = structure.full_rank(spec, variant)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= top:
        raise PlanError(
            f"{site}: {structure.name}: expected a rank from 1 to {top}, found {values.shown(rank)}; make a new plan"
        )
    ways = lowerings(structure.stages(spec, planned.parameters))
    if planned.lowering not in ways:
        raise PlanError(
            f"{site}: {structure.name}: expected the lowering {' or '.join(ways)}, found {planned.lowering!r}"
        )
    return structure
