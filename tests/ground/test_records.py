"""Values in files of JSON: an entry that stands twice, and truth values in the place of numbers."""

import json
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from convrewrite.json_texts import each_key_once
from convrewrite.records import Record, first_fault


class Inner(Record):
    passed: bool | None = None
    calls: int = 1


class Outer(Record):
    schema_version: Literal[1] = 1
    share: float | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    budget: dict[str, float | None] = Field(default_factory=dict)
    settings: dict[str, float | str] = Field(default_factory=dict)
    rows: tuple[Inner, ...] = ()
    one: Inner = Inner()


def test_what_was_written_is_read_again() -> None:
    made = Outer(
        share=float("inf"), shapes=((1, 3),), budget={"macs": 0.5, "params": None}, settings={"way": "adam", "rate": 0.1},
        rows=(Inner(passed=True), Inner(passed=False)), one=Inner(passed=True, calls=2),
    )  # fmt: skip
    assert Outer.read(made.model_dump_json()) == made
    assert Outer.model_validate(made.model_dump()) == made


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ({"schema_version": True}, "schema_version"),
        ({"share": False}, "share"),
        ({"shapes": [[1, True]]}, "shapes"),
        ({"budget": {"macs": True}}, "budget"),
        ({"settings": {"rate": True}}, "settings"),
        ({"rows": [{"calls": True}]}, "rows.0.calls"),
        ({"one": {"calls": True}}, "one.calls"),
    ],
)
def test_a_truth_value_is_no_number(said: dict[str, object], where: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Outer.read(json.dumps(said))
    assert first_fault(refused.value) == f"{where}: Value error, Input should not be true or false"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"share": 1, "share": 1}', "'share'"),
        ('{"one": {"calls": 1, "calls": 2}}', "'calls'"),
        ('{"budget": {"": 1, "": 2}}', "''"),
    ],
)
def test_an_entry_that_stands_twice_says_nothing(text: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: expected once in its object, found more than once") as refused:
        Outer.read(text)
    assert first_fault(refused.value).startswith(key)
    with pytest.raises(ValueError, match=key):
        each_key_once(text)


def test_one_key_in_several_objects_is_no_fault() -> None:
    assert each_key_once('[{"a": {"a": 1}}, {"a": 2}]') == [{"a": {"a": 1}}, {"a": 2}]
