"""Checks that the fields of a dataclass have the types that they are declared with: a value of a wrong type would otherwise show
only stages later, as an error of another library."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from numbers import Integral
from os import PathLike
from typing import Any

from convrewrite import places, values
from convrewrite.errors import UsageError
from convrewrite.settings.constraints import Keep
from convrewrite.values import is_number


@dataclass(frozen=True, slots=True)
class FieldKind:
    """What a field takes beside its default, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _are_meanings(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and (isinstance(said, str) or (isinstance(said, tuple | list) and len(said) == 2))
        for name, said in value.items()
    )


def _is_fidelity(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(is_number(limit) for limit in value.values())
    return is_number(value) or isinstance(value, Keep)


BOOLEAN = FieldKind("True or False", lambda value: isinstance(value, bool))
WHOLE = FieldKind("a whole number", _is_whole)
NUMBER = FieldKind("a number", is_number)
TEXT = FieldKind("text", _is_text)
NAMES = FieldKind('names, as ["a", "b"]', _are_names)

BY_TYPE: Mapping[Any, FieldKind] = {
    bool: BOOLEAN,
    bool | None: BOOLEAN,
    int: WHOLE,
    int | None: WHOLE,
    float: NUMBER,
    float | None: NUMBER,
    str: TEXT,
    str | None: TEXT,
    tuple[str, ...]: NAMES,
}
"""For fields whose type says all; the other fields are below, or have a check of their own."""

BY_NAME: Mapping[str, FieldKind] = {
    "budget": FieldKind(
        'parts of the original by their names, as {"macs": 0.5}', lambda value: isinstance(value, Mapping)
    ),
    "keep": FieldKind('a number as 0.98, or {"error": 0.02}', _is_fidelity),
    "outputs": FieldKind(
        'kinds by the names of outputs, as {"output": "logits"}, or pairs of a kind and a weight', _are_meanings
    ),
    "timings": FieldKind("the path of a file", lambda value: isinstance(value, str | PathLike)),
    "timer": FieldKind("a Timer", lambda value: hasattr(value, "time_onnx")),
}
"""For fields with a type of their own."""

OWN_CHECK = frozenset({"memory", "free_axes", "device"})
"""Fields whose values are checked with their kind, in :mod:`convrewrite.values` and :mod:`convrewrite.places`."""


def require_limits(asked: Any) -> None:
    """Raise UsageError for values of the fields that runs and recoveries share which no run can work with."""
    values.seed(asked.seed, "seed")
    values.threads(asked.threads, "threads")
    values.require_memory(asked.memory)
    values.seconds(asked.timeout, "timeout")
    places.there(asked.device, "device")


def require_kinds(asked: Any, by_name: Mapping[str, FieldKind] = BY_NAME) -> None:
    """Raise UsageError for a field of another kind than its type says; text where names are taken is one name, and numbers of
    NumPy become those of Python."""
    for field in fields(asked):
        value = _plain(field, getattr(asked, field.name))
        object.__setattr__(asked, field.name, value)
        kind = by_name.get(field.name, BY_TYPE.get(field.type))
        if kind is None or field.name in OWN_CHECK or value is field.default or kind.fits(value):
            continue
        raise UsageError(f"{field.name}: expected {kind.words}, found {_found(value)}; {_default(field)}")


def _plain(field: Field[Any], value: Any) -> Any:
    """The value as the field's type has it; a value that cannot be converted stays as it is."""
    if field.type in (tuple[str, ...], tuple[str, ...] | None, Sequence[str]):
        return _names(value)
    if not is_number(value) or isinstance(value, int | float):
        return value
    return int(value) if _is_whole(value) else float(value)


def _names(value: Any) -> Any:
    """Names one by one; a value that cannot be names stays as it is."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes) else value


def _found(value: object) -> str:
    return "None" if value is None else f"{values.shown(value)}, which is {_article(type(value).__name__)}"


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _default(field: Field[Any]) -> str:
    if field.default in (MISSING, None, ()):
        return "give one, or leave it out"
    return f"give one, or leave it out for {field.default!r}"
