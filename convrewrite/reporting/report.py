"""The report as a value: what was done to a model, what that saved, and how close the outputs stayed.

A :class:`Report` is checked when it is built: kept sites give a reason, and the totals are the sums of the rows. It
goes to JSON by ``report.model_dump_json()`` and comes back by ``Report.read(text)``. A number that was
not measured is None, never an estimate: predictions have fields of their own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Generic, Literal, Self, TypeVar

from pydantic import Field, model_validator

from convrewrite.records import TextRecord
from convrewrite.worst import Worst

if TYPE_CHECKING:
    from convrewrite.exports import Written

Number = TypeVar("Number", int, float)
LARGEST = 2**63 - 1
"""Any number in a report, at most: beyond it no float need hold it."""

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ErrorBasis = Literal["held-out inputs", "fitted inputs", "synthetic inputs", "weights"]


class Change(TextRecord, Generic[Number]):
    """A number of the original and of the rewritten model."""

    before: Annotated[Number, Field(ge=0, le=LARGEST)]
    after: Annotated[Number, Field(ge=0, le=LARGEST)]

    @property
    def ratio(self) -> float:
        """``after / before``; 1 when both are zero."""
        if self.before == self.after:
            return 1.0
        return self.after / self.before if self.before else float("inf")


WholeNumbers = Change[int]
"""Given a name here, as pickle looks a class up by its name in its module."""


class LatencyChange(TextRecord):
    """Seconds for one input, each the median of its rounds, and the ratio of the two.

    ``ratio`` is the median of the ratios of paired, interleaved rounds and ``quartiles`` are their lower and upper
    quartile. It is not ``after / before``: the ratio of two medians follows whatever else the machine did in between.
    """

    before: Seconds
    after: Seconds
    ratio: Seconds
    quartiles: tuple[Seconds, Seconds]

    @model_validator(mode="after")
    def _ratio_lies_between_its_quartiles(self) -> Self:
        low, high = self.quartiles
        if not low <= self.ratio <= high:
            raise ValueError(f"expected a ratio between its quartiles, found {self.ratio} outside {low} to {high}")
        return self


class Asked(TextRecord):
    """What the caller asked for.

    ``budget`` holds parts of the original's cost, such as ``{"macs": 0.5}``; it is empty when every rule's own ratio
    was used. ``keep`` is the least fidelity in words, such as ``top-1 agreement of at least 0.98``. ``opset`` and ``free_axes``
    are those of the ONNX file, where they were given.
    """

    budget: dict[str, float] = Field(default_factory=dict)
    keep: str | None = None
    opset: int | None = None
    free_axes: tuple[str, ...] | None = None


class Reached(TextRecord):
    """What came of it: for every key of the budget the measured part, or None when it was not measured."""

    budget: dict[str, float | None] = Field(default_factory=dict)
    keep: str | None = None


class CalibrationSummary(TextRecord):
    """Where the inputs came from, and how many examples the factors were fitted on and how many were held out."""

    source: str
    kind: Literal["data", "synthetic", "weights only"]
    fitted_on: Count = 0
    held_out: Count = 0


class SiteRow(TextRecord):
    """One site: what became of it, its costs summed over its calls (MACs of one example), and its output error.

    ``output_error`` is the relative error of the site's output, the root of the part of its variance that is left unexplained
    (without shifts of channels' means), and ``error_basis`` says what it was measured on.
    ``positions`` is how many patches of inputs the option was fitted on, ``unknowns`` how many numbers one has.
    """

    name: str
    kind: str
    geometry: str
    calls: Positive = 1
    action: Literal["rewritten", "kept"]
    option: str | None = None
    reason: str | None = None
    parameters_before: Count
    parameters_after: Count
    macs_before: Count
    macs_after: Count
    output_error: Annotated[float, Field(ge=0)] | None = None
    error_basis: ErrorBasis | None = None
    positions: Positive | None = None
    unknowns: Positive | None = None

    @model_validator(mode="after")
    def _says_what_and_why(self) -> Self:
        if self.action == "rewritten" and not self.option:
            raise ValueError(f"{self.name}: expected the option of a rewritten site, found none")
        if self.action == "kept" and (not self.reason or self.option):
            raise ValueError(f"{self.name}: expected a reason and no option for a kept site")
        if self.action == "kept" and (self.parameters_saved or self.macs_saved):
            raise ValueError(f"{self.name}: expected a kept site to cost what it did, found another cost after it")
        if (self.output_error is None) != (self.error_basis is None):
            raise ValueError(f"{self.name}: expected output_error and error_basis together, found only one of them")
        if (self.positions is None) != (self.unknowns is None):
            raise ValueError(f"{self.name}: expected positions and unknowns together, found only one of them")
        return self

    @property
    def parameters_saved(self) -> int:
        """Parameters before minus after."""
        return self.parameters_before - self.parameters_after

    @property
    def macs_saved(self) -> int:
        """MACs before minus after."""
        return self.macs_before - self.macs_after


class Totals(TextRecord):
    """The whole model. ``file_bytes`` is the size of the ONNX files; latencies are seconds for one input.

    ``predicted_in``: the runtime in which the times were measured that predict the latency, where they came from elsewhere."""

    parameters: Change[int]
    macs: Change[int]
    file_bytes: Change[int] | None = None
    onnx_latency_seconds: LatencyChange | None = None
    torch_latency_seconds: LatencyChange | None = None
    predicted_onnx_latency_seconds: Seconds | None = None
    predicted_in: str | None = None


class OutputFidelityRow(TextRecord):
    """How close one output of the rewritten model is to the original's, as what it was taken for.

    ``top1_agreement`` is the part of the examples, or positions, with the same class on top, of logits and probabilities.
    ``kl`` is in nats: of the softmax of logits, of probabilities as they are, of independent probabilities the mean over
    their entries. ``cosine`` is that of embeddings. ``equal_share`` is the part of the entries of an integer or boolean
    output that are equal, and ``relative_error`` there the part that differs. ``unexplained`` is the part of the variance of
    values that is lost, the mean over their units; ``relative_error`` of scores beside boxes is that of the worse.
    """

    name: str
    relative_error: float
    top1_agreement: Share | None = None
    kl: float | None = None
    equal_share: Share | None = None
    cosine: float | None = None
    unexplained: float | None = None
    taken_for: str | None = None


class OutputRow(TextRecord):
    """What one output of the original was taken for, why, and its weight among several; a kind of ``ignore`` is not compared."""

    name: str
    taken_for: str
    reason: str
    weight: float = 1.0


class ParityRow(TextRecord):
    """A runtime against torch for one output of the rewritten model; ``equal_share`` as in :class:`OutputFidelityRow`."""

    name: str
    max_abs_difference: float
    relative_error: float
    tolerance: float
    passed: bool
    equal_share: Share | None = None
    runtime: str = "onnxruntime"


class RecoveredSummary(TextRecord):
    """What a recovery by distillation did. ``before`` and ``after`` are how far the outputs were from the original's on inputs
    that were ``held_out``: nats of KL for class scores, the unexplained variance of numbers; ``curve`` has that after so many
    steps. ``kept_step`` is the step whose parameters were kept, 0 where nothing was better than what came in; ``ended`` says why
    it ended earlier than asked.
    """

    before: Annotated[float, Field(ge=0)]
    after: Annotated[float, Field(ge=0)]
    steps: Count
    kept_step: Count
    minutes: Annotated[float, Field(ge=0)]
    trained_on: Positive
    held_out: Positive
    settings: dict[str, int | float | str] = Field(default_factory=dict)
    curve: tuple[tuple[Count, float], ...] = ()
    ended: str | None = None

    @model_validator(mode="after")
    def _never_worse(self) -> Self:
        if self.after > self.before:
            raise ValueError(f"expected a result no worse than what came in, found {self.after} after {self.before}")
        return self

    @property
    def unchanged(self) -> bool:
        """Whether what came in was returned."""
        return self.kept_step == 0


class ExportRow(TextRecord):
    """A form that the result was written in besides ONNX: its ``files`` beside the report, their ``bytes``, and the ``package``
    that wrote them, with its version.

    ``max_abs_difference`` and ``relative_error`` are to the rewritten model in torch (of a model that came as ONNX, to its ONNX
    file), of the worst output over ``examples``; ``passed`` is None where the form cannot be run on this machine.
    ``output_error``, ``top1_agreement`` and ``kl`` are to the original, as in :class:`OutputFidelityRow`, of the worst output.
    ``refused``: why it was left out.
    """

    name: str
    package: str
    files: tuple[str, ...] = ()
    bytes: Count = 0
    max_abs_difference: float | None = None
    relative_error: float | None = None
    tolerance: float | None = None
    passed: bool | None = None
    output_error: float | None = None
    top1_agreement: Share | None = None
    kl: float | None = None
    examples: Count = 0
    notes: tuple[str, ...] = ()
    refused: str | None = None

    @model_validator(mode="after")
    def _is_there_or_says_why(self) -> Self:
        if bool(self.files) == bool(self.refused):
            raise ValueError(f"{self.name}: expected files, or the reason why there are none")
        return self

    @classmethod
    def of(cls, written: "Written") -> Self:
        """From what was written, or was not."""
        difference, error, tolerance = written.parity or (None, None, None)
        near = None if written.fidelity is None else Worst.of(written.fidelity.outputs)
        return cls(
            name=written.name,
            package=written.package,
            files=tuple(path.name for path in written.files),
            bytes=written.size,
            max_abs_difference=difference,
            relative_error=error,
            tolerance=tolerance,
            passed=False if written.refused else None if written.parity is None else True,
            output_error=None if near is None else near.error,
            top1_agreement=None if near is None else near.agreement,
            kl=None if near is None else near.kl,
            examples=written.examples,
            notes=written.notes,
            refused=written.refused,
        )


class Environment(TextRecord):
    """The versions and the machine that the numbers come from."""

    python: str
    torch: str
    onnx: str | None = None
    onnxruntime: str | None = None
    platform: str
    cpu: str
    cores: Positive


class Report(TextRecord):
    """Everything one run did and measured. ``seconds`` is the wall time of each stage, ``refused`` why the result is no
    success though everything ran: it is slower than the original, costs more than its budget, loses more than was to be kept, or
    is ``useless``: it does not compute the same any more, as the first of the ``warnings`` says.

    ``runtime`` is where the result is to run: what ``totals.onnx_latency_seconds`` was measured in, and its prediction unless
    ``totals.predicted_in`` names another.

    ``exports`` are the forms that it was written in besides ONNX. ``digests`` has the SHA-256 of the plan and of the files of
    weights beside it, by their names, once it is saved.

    ``fidelity_basis`` is a sentence: ``measured on 205 held-out calibration inputs``. ``commands`` are the command lines that
    led here, as a shell takes them; there are none of results that Python made.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    model: str
    input_shapes: tuple[tuple[Count, ...], ...]
    rules: tuple[str, ...]
    asked: Asked = Asked()
    reached: Reached = Reached()
    refused: str | None = None
    useless: bool = False
    warnings: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    seed: Count
    threads: Positive
    calibration: CalibrationSummary
    sites: tuple[SiteRow, ...]
    totals: Totals
    outputs: tuple[OutputRow, ...] = ()
    fidelity: tuple[OutputFidelityRow, ...] = ()
    fidelity_examples: Count = 0
    fidelity_basis: str | None = None
    parity: tuple[ParityRow, ...] = ()
    runtime: str = "onnxruntime"
    runtime_version: str | None = None
    recovered: RecoveredSummary | None = None
    exports: tuple[ExportRow, ...] = ()
    digests: dict[str, str] = Field(default_factory=dict)
    environment: Environment
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)

    @property
    def unwritten(self) -> str | None:
        """Why the first form that was asked for and refused was left out."""
        return next((f"export {row.name}: {row.refused}" for row in self.exports if row.refused is not None), None)

    def with_exports(self, written: Sequence["Written"]) -> Self:
        """With these forms; a new one replaces an earlier one of the same name."""
        rows = {row.name: row for row in (*self.exports, *map(ExportRow.of, written))}
        return self.model_copy(update={"exports": tuple(rows.values())})

    @model_validator(mode="after")
    def _totals_are_the_sums_of_the_sites(self) -> Self:
        for what, total, saved in (
            ("parameters", self.totals.parameters, sum(site.parameters_saved for site in self.sites)),
            ("macs", self.totals.macs, sum(site.macs_saved for site in self.sites)),
        ):
            if total.before - total.after != saved:
                raise ValueError(
                    f"totals.{what}: expected a difference of {saved}, the sum over the sites, "
                    f"found {total.before - total.after}"
                )
        return self

    @model_validator(mode="after")
    def _what_was_asked_is_answered(self) -> Self:
        if set(self.asked.budget) != set(self.reached.budget):
            asked, reached = ", ".join(self.asked.budget) or "none", ", ".join(self.reached.budget) or "none"
            raise ValueError(f"reached.budget: expected the keys of asked.budget ({asked}), found {reached}")
        if self.fidelity and not self.fidelity_basis:
            raise ValueError("fidelity_basis: expected a sentence that says what fidelity was measured on, found none")
        if self.useless and not self.warnings:
            raise ValueError("warnings: expected a sentence that says why the result is useless, found none")
        return self


class AnalysisRow(TextRecord):
    """One site of a model that nothing was done to yet; ``applies`` maps each rule to ``yes`` or to its reason."""

    name: str
    kind: str
    geometry: str
    calls: Positive = 1
    parameters: Count
    macs: Count
    mac_share: Annotated[float, Field(ge=0, le=1)]
    applies: dict[str, str] = Field(default_factory=dict)
