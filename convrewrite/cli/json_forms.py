"""What ``--json`` prints for commands whose values have no JSON form of their own, and the schemas of all commands."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import FloatSchema

from convrewrite.pipeline import Int8Row
from convrewrite.planning import Plan, PlannedSite
from convrewrite.records import Record
from convrewrite.reporting import AnalysisRow, Compared, Report, SweepReport
from convrewrite.rules import RuleFile
from convrewrite.runtime import Verification
from convrewrite.targets import Comparison
from convrewrite.worst import Worst

Number = Annotated[
    float | None, BeforeValidator(lambda found: found if found is None or math.isfinite(found) else None)
]
"""JSON has no infinity and no NaN: they are null."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VerifiedOutput(_Form):
    """One output of two models: ``taken_for`` what it means; the first group of numbers is of parity, up to rounding, the second
    of fidelity, as in a report."""

    name: str
    taken_for: str
    max_abs_difference: Number
    parity_error: Number
    tolerance: float
    same: bool
    relative_error: Number
    unexplained: Number
    top1_agreement: Number
    kl: Number
    cosine: Number
    equal_share: Number


class Verified(_Form):
    """Two models on the same inputs; ``expected`` says what had to hold, ``refused`` why it does not."""

    schema_version: int = 1
    a: str
    b: str
    examples: int
    inputs: Literal["calibration inputs", "random inputs"]
    expected: Literal["parity", "fidelity"]
    outputs: tuple[VerifiedOutput, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    refused: str | None

    @classmethod
    def of(cls, outcome: Verification, **said: Any) -> "Verified":
        """From what was compared; ``said`` are the fields that this does not hold."""
        outputs = tuple(
            VerifiedOutput(
                name=parity.name,
                taken_for=fidelity.kind,
                max_abs_difference=parity.max_abs_difference,
                parity_error=parity.relative_error,
                tolerance=parity.tolerance,
                same=parity.passed,
                relative_error=fidelity.relative_error,
                unexplained=fidelity.unexplained,
                top1_agreement=fidelity.top1_agreement,
                kl=fidelity.kl,
                cosine=fidelity.cosine,
                equal_share=fidelity.equal_share,
            )
            for parity, fidelity in zip(outcome.parity.outputs, outcome.fidelity.outputs, strict=True)
        )
        return cls(outputs=outputs, left_out=outcome.fidelity.left_out, notes=outcome.notes, **said)


class BenchedRow(_Form):
    """Two models in one runtime: medians of seconds, and the median over rounds of b / a with its quartiles."""

    runtime: str
    threads: int
    rounds: int
    seconds_a: float
    seconds_b: float
    ratio: float
    ratio_low: float
    ratio_high: float

    @classmethod
    def of(cls, found: Comparison) -> "BenchedRow":
        """From what was timed."""
        return cls(**{name: getattr(found, name) for name in cls.model_fields})


class Benched(_Form):
    """Two models timed against each other, on one example of these shapes unless they take no other number."""

    schema_version: int = 1
    a: str
    b: str
    input_shapes: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()
    timings: tuple[BenchedRow, ...]


class Timings(_Form):
    """What a file of timings holds: seconds by option, null for what the runtime cannot run; ``model`` tells the original from
    other models."""

    format: int
    runtime: str
    version: str
    processor: str
    block: int
    threads: int
    seconds: dict[str, Number]
    model: str | None = None


class QuantisedModel(_Form):
    """One of four models: ``latency`` as a part of the original's, errors and agreement of its worst output with the original's,
    and ``float_error`` to the file it was made of."""

    name: str
    bytes: int
    macs: int
    latency: Number
    relative_error: Number
    top1_agreement: Number
    kl: Number
    float_error: Number
    how: str

    @classmethod
    def of(cls, row: Int8Row) -> "QuantisedModel":
        """From its row."""
        worst = Worst.of(row.fidelity.outputs)
        return cls(
            name=row.name,
            bytes=row.bytes,
            macs=row.macs,
            latency=row.latency,
            relative_error=worst.error,
            top1_agreement=worst.agreement,
            kl=worst.kl,
            float_error=row.float_error,
            how=row.way,
        )


class QuantisedModels(_Form):
    """Original, rewritten, and int8 of both, where the last was written, and what is wrong with it."""

    schema_version: int = 1
    written: str
    models: tuple[QuantisedModel, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[Int8Row], written: Path, warnings: tuple[str, ...]) -> "QuantisedModels":
        """From the rows."""
        return cls(written=str(written), models=tuple(map(QuantisedModel.of, rows)), warnings=warnings)


class BuiltinRule(_Form):
    """A rule that comes with the package."""

    name: str
    description: str


class BuiltinRules(_Form):
    """All of them."""

    schema_version: int = 1
    rules: tuple[BuiltinRule, ...]


class CheckedExample(_Form):
    """One of a rule file's own examples."""

    rule: str
    example: str
    passed: bool
    text: str


class CheckedRules(_Form):
    """A rule file that is valid, and whether its examples hold."""

    schema_version: int = 1
    file: str
    passed: bool
    examples: tuple[CheckedExample, ...]


SCHEMAS: dict[str, tuple[type[BaseModel], str]] = {
    "report": (Report, "optimize, apply, recover, report, export"),
    "plan": (Plan, "plan, explain"),
    "site": (PlannedSite, "explain with a site"),
    "sweep": (SweepReport, "sweep"),
    "sites": (AnalysisRow, "analyze, a list of them"),
    "compared": (Compared, "compare"),
    "verified": (Verified, "verify"),
    "benched": (Benched, "bench"),
    "timings": (Timings, "profile"),
    "quantised": (QuantisedModels, "quantise"),
    "rules": (BuiltinRules, "rules list"),
    "rule": (RuleFile, "rules show"),
    "checked": (CheckedRules, "rules check"),
}
"""What is printed, and by which commands."""


class _WithInfinities(GenerateJsonSchema):
    """A schema in which a number may be one of the texts that a record has for what JSON has no number for."""

    def float_schema(self, schema: FloatSchema) -> dict[str, Any]:
        """Numbers, or these texts unless the field excludes them."""
        number: dict[str, Any] = super().float_schema(schema)
        finite = schema.get("allow_inf_nan") is False
        return number if finite else {"anyOf": [number, {"enum": ["Infinity", "-Infinity", "NaN"]}]}


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of what is printed."""
    return kind.model_json_schema(schema_generator=_WithInfinities if issubclass(kind, Record) else GenerateJsonSchema)
