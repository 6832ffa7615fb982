"""The base class of values that are written as JSON and read again: :class:`Record`."""

from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from convrewrite.escaping import as_text
from convrewrite.json_texts import each_key_once


class Record(BaseModel):
    """A frozen value that refuses unknown keys, and true and false in place of numbers, which Python takes for one and zero."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if bool in (annotation, *get_args(annotation)):
            return value
        if _has_truth_value(value, get_origin(annotation) is dict):
            raise ValueError("Input should not be true or false")
        return value

    @classmethod
    def read(cls, text: str) -> Self:
        """The value in the text of a file. Raises ValidationError, and ValueError for a key that an object has twice."""
        made = cls.model_validate_json(text)
        each_key_once(text)
        return made


class TextRecord(Record):
    """One whose texts may be names of files, written out by :func:`as_text`."""

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cls._can_be_written(entry) for entry in value)
        return as_text(value) if isinstance(value, str) else value


def first_fault(error: ValueError) -> str:
    """What is wrong with a text that :meth:`Record.read` refused: where, and what."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the file'}: {first['msg']}"


def _has_truth_value(value: object, is_table: bool) -> bool:
    """Whether it is one, or has one among its entries; those of another record are for that to judge."""
    if isinstance(value, list | tuple):
        return any(_has_truth_value(entry, False) for entry in value)
    if isinstance(value, dict) and is_table:
        return any(_has_truth_value(entry, False) for entry in value.values())
    return isinstance(value, bool)
