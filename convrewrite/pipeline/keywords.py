"""The keyword arguments of the entry points, with types: the fields of Settings, and arguments that are not settings."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar, get_args

from torch import Tensor

from convrewrite.calibration import Reading
from convrewrite.errors import UsageError
from convrewrite.progress import Progress, silent
from convrewrite.rules import Rule, RuleFile
from convrewrite.settings import (
    ChoiceOptions,
    FieldKind,
    FormOptions,
    KeepSource,
    Recovery,
    RecoveryOptions,
    Settings,
    WorkOptions,
    require_kinds,
)
from convrewrite.structures import Structure
from convrewrite.tuning import Augment

RuleSource = str | Path | Rule | RuleFile
Budget = Mapping[str, float] | None
Entry = TypeVar("Entry", bound=Callable[..., Any])


KINDS = {
    "structures": FieldKind(
        "structures, as convrewrite.structures.discover() gives them",
        lambda value: isinstance(value, Sequence) and all(hasattr(one, "stages") for one in value),
    ),
    "progress": FieldKind("a function of a stage, a position, a total and a text", callable),
    "name": FieldKind("text", lambda value: isinstance(value, str)),
    "notes": FieldKind(
        "sentences", lambda value: isinstance(value, tuple) and all(isinstance(note, str) for note in value)
    ),
    "augment": FieldKind("a function of a batch", callable),
    "labels": FieldKind("a tensor of whole numbers", lambda value: isinstance(value, Tensor)),
    "checkpoint": FieldKind("the path of a file", lambda value: isinstance(value, str | Path)),
    "resume": FieldKind("True or False", lambda value: isinstance(value, bool)),
    "reading": FieldKind("a Reading", lambda value: isinstance(value, Reading)),
}
"""The arguments that are not settings, by keyword."""


class RunKeywords(TypedDict, total=False):
    """What a run takes besides settings."""

    structures: Sequence[Structure]
    progress: Progress | None


class ReportKeywords(RunKeywords, total=False):
    """What a run that leaves a report takes: the model's name in it, and further notes."""

    name: str | None
    notes: Sequence[str]


class PlanKeywords(ChoiceOptions, RunKeywords, total=False):
    """The keywords of ``plan``."""

    keep: KeepSource


class FrontierKeywords(ChoiceOptions, ReportKeywords, total=False):
    """The keywords for one model of a sweep, whose budgets decide what is chosen."""


class OptimizeKeywords(FrontierKeywords, FormOptions, total=False):
    """The keywords of ``optimize`` and of the fx pass, which alone improve a plan once it is fitted. Entry points that leave no
    model file, ``plan`` and ``sweep``, take no forms of one."""

    keep: KeepSource
    int8: bool


class SweepKeywords(FrontierKeywords, total=False):
    """The keywords of ``sweep``."""

    cluster: str | None


class ApplyKeywords(WorkOptions, FormOptions, ReportKeywords, total=False):
    """The keywords of ``apply``, in which a plan decides what is chosen."""


@dataclass(frozen=True, slots=True)
class _CommonExtras:
    """The arguments of runs and recoveries that are not settings."""

    structures: Sequence[Structure] = ()
    progress: Progress | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_kinds(self, KINDS)

    @property
    def listener(self) -> Progress:
        """Who is told how far the run is."""
        return self.progress or silent


@dataclass(frozen=True, slots=True)
class Extras(_CommonExtras):
    """The arguments of a run that are not settings."""

    name: str | None = None

    def keywords(self) -> dict[str, Any]:
        """The arguments as they were given."""
        return {extra.name: getattr(self, extra.name) for extra in fields(self)}


class RecoverKeywords(RecoveryOptions, RunKeywords, total=False):
    """The keywords of ``recover``."""

    augment: Augment | None
    labels: Tensor | None
    checkpoint: str | Path | None
    resume: bool
    reading: Reading | None
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class RecoveryExtras(_CommonExtras):
    """The arguments of ``recover`` that are not settings."""

    augment: Augment | None = None
    labels: Tensor | None = None
    checkpoint: str | Path | None = None
    resume: bool = True
    reading: Reading | None = None


def asked(
    settings: Settings | None, positional: Mapping[str, Any], keywords: Mapping[str, Any], known: Any
) -> tuple[Settings, Extras]:
    """What was asked, from ``settings`` or from its fields: ``positional`` ones, of which None counts as not given, and
    ``keywords``.

    Raises TypeError for keywords that are not ``known``, UsageError where both are given, and what Settings raises.
    """
    extras, options = _sorted_out(keywords, known, Extras)
    options |= {name: value for name, value in positional.items() if value is not None}
    _require_alone(settings, Settings, options)
    return settings or Settings(**options), Extras(**extras)


def asked_of(settings: Recovery | None, keywords: Mapping[str, Any]) -> tuple[Recovery, RecoveryExtras]:
    """As :func:`asked`, for a recovery."""
    extras, options = _sorted_out(keywords, RecoverKeywords, RecoveryExtras)
    _require_alone(settings, Recovery, options)
    return settings or Recovery(**options), RecoveryExtras(**extras)


def _sorted_out(keywords: Mapping[str, Any], known: Any, kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords that are fields of ``kind``, and all others. Raises TypeError for keywords that are not ``known``."""
    require_known(keywords, known)
    extras = {extra.name: keywords[extra.name] for extra in fields(kind) if extra.name in keywords}
    return extras, {name: value for name, value in keywords.items() if name not in extras}


def require_known(keywords: Mapping[str, Any], known: Any) -> None:
    """Raise TypeError for keywords that are not ``known``, as Python does, with those that are."""
    for name in keywords.keys() - known.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {name!r}; expected {', '.join(sorted(known.__annotations__))}")


def settings_of(settings: Settings | None) -> Settings:
    """The settings that were given, or the defaults. Raises UsageError for anything else."""
    _require_alone(settings, Settings, {})
    return settings or Settings()


def _require_alone(settings: object, kind: type, options: Mapping[str, Any]) -> None:
    """Raise UsageError for settings of another kind, and if both settings and options are given."""
    if settings is None:
        return
    if not isinstance(settings, kind):
        raise UsageError(
            f"settings: expected convrewrite.{kind.__name__}(...), found {type(settings).__name__}; make one, or give its "
            "fields as keywords"
        )
    if options:
        raise UsageError(
            f"settings: expected alone, found {', '.join(options)} beside it; give one or the other, "
            "or dataclasses.replace(settings, ...)"
        )


def signed(entry: Entry) -> Entry:
    """The same function; ``inspect.signature`` and ``help`` show its typed keywords one by one, with their defaults."""
    signature = inspect.signature(entry)
    *named, rest = signature.parameters.values()
    (keywords,) = get_args(rest.annotation)
    defaults = {f.name: f.default for kind in (Recovery, RecoveryExtras, Settings, Extras) for f in fields(kind)}
    shown = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if defaults.get(name, MISSING) is MISSING else defaults[name],
            annotation=annotation,
        )
        for name, annotation in keywords.__annotations__.items()
    ]
    entry.__signature__ = signature.replace(parameters=[*named, *shown])  # type: ignore[attr-defined]
    return entry
