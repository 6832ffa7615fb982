"""The schema of rule files, key by key, and how a rule decides about a convolution.

A rule takes a site when every key of ``match`` agrees and ``protect`` does not forbid it. Whether a *structure* can
rewrite the geometry is for the structure to say: rules only name structures, they do not know them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import re2
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from convrewrite.conv import ConvSpec, Kind, Size, classify
from convrewrite.values import counted, shape_text

_QUIET = re2.Options()
"""Options of RE2, which would otherwise print patterns that it cannot read. Its time grows with the length of a
name, whatever the pattern."""

_QUIET.log_errors = False


LARGE_SHARE = 0.1
"""Part of what a budget leaves of a network's MACs from which it is hard to keep without a site. The stem of a ResNet-18 has
0.065 of its MACs, thus 0.13 of the half; of networks for sound it has up to a half of them all."""

TOLD = 0.1
"""A budget from which on a protected site takes part is told if it is at least this: few ask for less."""

NARROWEST = 8
"""Channels on a convolution's narrower side below which it is kept, unless a rule or ``LARGE_SHARE`` says otherwise."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a rule looks at: one site, and ``mac_share``, its part in [0, 1] of the MACs of all convolutions.

    ``left``: the part of the network that a budget leaves, where an option is chosen by what it does to the model's outputs;
    otherwise None.
    """

    name: str
    kind: Kind
    spec: ConvSpec
    is_stem: bool = False
    mac_share: float = 1.0
    left: float | None = None

    @property
    def weighed_from(self) -> float:
        """The largest budget that the site would have ``LARGE_SHARE`` of, or 1."""
        return min(1.0, round(self.mac_share / LARGE_SHARE, 12))  # 0.02 / 0.1 is less than 0.2 in binary


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a rule leaves a site alone: the key, as ``kind`` or ``protect.stem``, and a sentence for the report."""

    key: str
    text: str


def _expected(what: str) -> PydanticCustomError:
    return PydanticCustomError("expected", "{what}", {"what": what})


def _wrong(text: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{text}", {"text": text})


def _expect(what: str, holds: Callable[[Any], bool]) -> BeforeValidator:
    """A validator whose message names what was expected, in one piece."""

    def validate(value: object) -> object:
        if not holds(value):
            raise _expected(what)
        return value

    return BeforeValidator(validate)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pair(value: object, least: int = 1) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(_is_whole(item, least) for item in value)


def _is_pattern(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re2.compile(value, _QUIET)
    except (re2.error, UnicodeError):
        return False
    return True


def _as_sizes(value: object) -> object:
    if _is_pair(value):
        return (value,)
    if isinstance(value, list | tuple) and value and all(_is_pair(item) for item in value):
        return value
    raise _expected("a pair of whole numbers [height, width], or a list of such pairs")


def _as_range(value: object) -> object:
    if _is_whole(value):
        return {"min": value, "max": value}
    if isinstance(value, dict | Range):
        return value
    raise _expected("a whole number of at least 1, or a table { min = .., max = .. }")


def _as_kinds(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Word = Annotated[str, _expect("text that is not empty", lambda v: isinstance(v, str) and bool(v.strip()))]
Fraction = Annotated[float, _expect("a number in (0, 1)", lambda v: _is_number(v) and 0 < v < 1)]
Share = Annotated[float, _expect("a number in [0, 1]", lambda v: _is_number(v) and 0 <= v <= 1)]
Positive = Annotated[float, _expect("a number above 0", lambda v: _is_number(v) and 0 < v < math.inf)]
Whole = Annotated[int, _expect("a whole number of at least 1", _is_whole)]
Natural = Annotated[int, _expect("a whole number of at least 0", lambda v: _is_whole(v, 0))]
Pattern = Annotated[
    str, _expect("a regular expression without backreferences and lookarounds (the syntax of RE2)", _is_pattern)
]
ParameterValue = Annotated[
    int | float | str, _expect("a number or text", lambda v: _is_number(v) or isinstance(v, str))
]
PositivePair = Annotated[Size, _expect("a pair of whole numbers [height, width], each at least 1", _is_pair)]
NaturalPair = Annotated[Size, _expect("a pair of whole numbers [height, width]", lambda v: _is_pair(v, 0))]
Padding = Annotated[
    Size | str,
    _expect('a pair of whole numbers, "same" or "valid"', lambda v: v in ("same", "valid") or _is_pair(v, 0)),
]
_SOME = _expect("a list with at least one entry", lambda v: isinstance(v, list | tuple) and len(v) > 0)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Range(_Table):
    """Whole numbers from ``min`` to ``max``, both included; one of the two may be left out."""

    min: Whole | None = None
    max: Whole | None = None

    @model_validator(mode="after")
    def _has_an_order(self) -> Self:
        if self.min is None and self.max is None:
            raise _wrong("expected min, max or both, found neither")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise _wrong(f"expected min to be at most max, found min = {self.min} and max = {self.max}")
        return self

    def __contains__(self, number: int) -> bool:
        """Whether the number lies in the range."""
        return (self.min is None or self.min <= number) and (self.max is None or number <= self.max)

    def __str__(self) -> str:
        """As a refusal says it: ``64``, ``64 or more``, ``8 to 64``."""
        if self.min == self.max:
            return str(self.min)
        if self.max is None:
            return f"{self.min} or more"
        return f"{self.max} or less" if self.min is None else f"{self.min} to {self.max}"


Sizes = Annotated[tuple[Size, ...], BeforeValidator(_as_sizes)]
Interval = Annotated[Range, BeforeValidator(_as_range)]


class Match(_Table):
    """Which sites a rule takes; a key that is left out agrees with everything. ``name`` must match as a whole."""

    kind: Annotated[tuple[Kind, ...], _SOME, BeforeValidator(_as_kinds)] | None = None
    kernel_size: Sizes | None = None
    stride: Sizes | None = None
    dilation: Sizes | None = None
    in_channels: Interval | None = None
    out_channels: Interval | None = None
    groups: Interval | None = None
    name: Pattern | None = None

    def refusals(self, subject: Subject) -> Iterator[Refusal]:
        """Every key that does not agree with the site."""
        spec = subject.spec
        if self.kind is not None and subject.kind not in self.kind:
            yield _not_taken("kind", subject.kind, ", ".join(self.kind))
        for key, size, sizes in (
            ("kernel_size", spec.kernel_size, self.kernel_size),
            ("stride", spec.stride, self.stride),
            ("dilation", spec.dilation, self.dilation),
        ):
            if sizes is not None and size not in sizes:
                yield _not_taken(key, shape_text(size), shape_text(*sizes))
        for key, number, bounds in (
            ("in_channels", spec.in_channels, self.in_channels),
            ("out_channels", spec.mixed.out_channels, self.out_channels),
            ("groups", spec.groups, self.groups),
        ):
            if bounds is not None and number not in bounds:
                yield _not_taken(key, number, bounds)
        if self.name is not None and re2.compile(self.name, _QUIET).fullmatch(subject.name) is None:
            yield Refusal("name", f"the name {subject.name} does not match {self.name}")


class Protect(_Table):
    """Sites that are left alone although they match: the first convolution the network runs, and the small ones.

    ``stem`` and ``min_channels`` None: as if true and 8, since such convolutions mostly save little and lose much. Where a budget
    leaves so little that a site would have ``LARGE_SHARE`` of it or more, this does not cover that site: its options' measured
    effects decide. What a rule file gives covers every site.
    """

    stem: StrictBool | None = None
    min_channels: Natural | None = None
    min_mac_share: Share = 0.001

    def refusals(self, subject: Subject) -> Iterator[Refusal]:
        """Every protection that covers the site."""
        channels = min(subject.spec.in_channels, subject.spec.mixed.out_channels)
        weighed = subject.left is not None and subject.left <= subject.weighed_from
        if subject.is_stem and (not weighed if self.stem is None else self.stem):
            text = "it is the stem, the first convolution the network runs"
            yield Refusal("protect.stem", text + (_way_out(subject) if self.stem is None else ""))
        least_channels = (1 if weighed else NARROWEST) if self.min_channels is None else self.min_channels
        if channels < least_channels:
            text = f"too small to gain: {counted(channels, 'channel')} on its narrower side, the rule asks for {least_channels}"
            yield Refusal("protect.min_channels", text + (_way_out(subject) if self.min_channels is None else ""))
        if subject.mac_share < self.min_mac_share:
            share, least = _told_apart(subject.mac_share, self.min_mac_share)
            text = f"too small to gain: {share} of the convolutions' MACs, the rule asks for {least}"
            yield Refusal("protect.min_mac_share", text)


def _told_apart(less: float, more: float) -> tuple[str, str]:
    """Two unequal parts of a whole as percentages, with as many digits as show which is less, at least two."""
    written = ((f"{less:.{digits}%}", f"{more:.{digits}%}") for digits in range(2, 16))
    return next((texts for texts in written if texts[0] != texts[1]), (repr(less), repr(more)))


def _way_out(subject: Subject) -> str:
    """Within which budgets a protected site takes part, if that is worth telling. Rounded down: what is told must do."""
    if subject.weighed_from < TOLD:
        return ""
    part = math.floor(round(100 * subject.weighed_from, 9)) / 100
    return "; it takes part within " + (
        "any budget" if part >= 1 else f"a budget that leaves {part:g} or less of the MACs"
    )


class Require(_Table):
    """What an option must keep to be chosen.

    ``min_mac_saving`` and ``min_latency_gain`` are parts of the site's own MACs and measured seconds;
    ``max_output_error`` is the relative error of the site's output. None: no such limit.
    """

    min_mac_saving: Fraction = 0.05
    max_output_error: Positive | None = None
    min_latency_gain: Fraction | None = None


class ExampleConv(_Table):
    """The geometry of an example, under the names and defaults of :class:`convrewrite.conv.ConvSpec`."""

    in_channels: Whole
    out_channels: Whole
    kernel_size: PositivePair
    stride: PositivePair = (1, 1)
    padding: Padding = (0, 0)
    dilation: PositivePair = (1, 1)
    groups: Whole = 1
    bias: StrictBool = True
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    transposed: StrictBool = False
    output_padding: NaturalPair = (0, 0)

    @model_validator(mode="after")
    def _is_a_convolution(self) -> Self:
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise _wrong(
                f"expected groups to divide both channel counts, found groups = {self.groups}, "
                f"in_channels = {self.in_channels} and out_channels = {self.out_channels}"
            )
        return self

    def spec(self) -> ConvSpec:
        """The same geometry as a value of the library."""
        return ConvSpec(**self.model_dump())


class Example(_Table):
    """A convolution the rule must take. ``kind`` is derived unless given; ``name`` is not tested unless given."""

    conv: ExampleConv
    kind: Kind | None = None
    name: Word | None = None
    stem: StrictBool = False
    mac_share: Share = 1.0

    def subject(self) -> Subject:
        """The example as a rule sees it."""
        spec = self.conv.spec()
        return Subject(self.name or "", self.kind or classify(spec), spec, self.stem, self.mac_share)


class RejectExample(Example):
    """A convolution the rule must leave alone: ``reason`` is the key that says so.

    ``structure`` means that the rule matches, but none of its structures can rewrite the geometry.
    """

    reason: Literal[
        "kind", "kernel_size", "stride", "dilation", "in_channels", "out_channels", "groups", "name",
        "protect.stem", "protect.min_channels", "protect.min_mac_share", "structure",
    ]  # fmt: skip


class Rule(_Table):
    """One entry of a rule file: which sites, which structures, which limits.

    ``ratio`` is the part of a site's own MACs an option may cost at most; it is used when no budget is given.
    ``parameters`` restricts a structure's parameters, structure -> parameter -> the values allowed.
    """

    name: Word
    reference: str = ""
    match: Match = Match()
    structures: Annotated[tuple[Word, ...], _SOME]
    parameters: dict[str, dict[str, Annotated[tuple[ParameterValue, ...], _SOME]]] = Field(default_factory=dict)
    ratio: Fraction = 0.5
    protect: Protect = Protect()
    require: Require = Require()
    accepts: tuple[Example, ...] = ()
    rejects: tuple[RejectExample, ...] = ()

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if twice := _twice(self.structures):
            raise _wrong(f"structures: expected each name once, found {twice} more than once")
        for name in self.parameters:
            if name not in self.structures:
                raise _wrong(f"parameters.{name}: expected one of the rule's structures, {', '.join(self.structures)}")
        return self

    def refusals(self, subject: Subject) -> Iterator[Refusal]:
        """Everything that keeps the rule from taking the site."""
        yield from self.match.refusals(subject)
        yield from self.protect.refusals(subject)

    def refuse(self, subject: Subject) -> Refusal | None:
        """The first refusal; None when the rule takes the site."""
        return next(self.refusals(subject), None)


class RuleFile(_Table):
    """A rule file: ``schema = 1``, a sentence, and at least one rule."""

    schema_: Annotated[Literal[1], _expect("1", lambda v: type(v) is int and v == 1)] = Field(alias="schema")
    description: str = ""
    rule: Annotated[tuple[Rule, ...], _SOME]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if twice := _twice(rule.name for rule in self.rule):
            raise _wrong(f"expected a different name for every rule, found {twice} more than once")
        return self


def _not_taken(key: str, found: object, taken: object) -> Refusal:
    return Refusal(key, f"{key} is {found}, the rule takes {taken}")


def _twice(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""
