"""How Python spells the options that messages name: every one of a setting, and only ones that there are."""

import inspect
import re
from dataclasses import fields

import pytest

import convrewrite
from convrewrite import Recovery, Settings
from convrewrite.calibration import Reading
from convrewrite.cli.options import Sources, Sweeping, Towards
from convrewrite.errors import CalibrationError, FitError, UsageError
from convrewrite.loading import load_model
from convrewrite.settings import FLAG
from convrewrite.spellings import IN_PYTHON, in_python

ENTRIES = [getattr(convrewrite, name) for name in convrewrite.__all__ if name[0].islower()]


@pytest.mark.parametrize("settings", [Settings, Recovery])
def test_every_option_of_a_setting_is_spelled_as_its_field(settings: type) -> None:
    for field in fields(settings):
        names = field.metadata[FLAG].names if FLAG in field.metadata else ()
        for option in (word for name in names for word in name.split("/")):
            assert IN_PYTHON[option].startswith(f"{field.name}="), option


@pytest.mark.parametrize("options", [Sources, Towards, Sweeping])
def test_every_other_option_of_a_run_is_spelled(options: type) -> None:
    """The original of a recovery and the folder of its result are named by position, or not at all."""
    names = {name.partition("/")[0] for field in fields(options) for name in field.metadata[FLAG].names}
    assert names - {"--model", "-o", "--out"} <= IN_PYTHON.keys()


def test_every_spelling_is_a_keyword_that_there_is() -> None:
    known = {
        name
        for entry in (*ENTRIES, Reading, load_model)
        if callable(entry)
        for name in inspect.signature(entry).parameters
    }
    for spelling in IN_PYTHON.values():
        assert set(re.findall(r"(\w+)=", spelling)) <= known, spelling


def test_an_error_says_it_in_a_note_and_its_text_stays_as_it_is() -> None:
    error = CalibrationError("inputs: too many; give fewer, or raise --memory; see --calib and --expect, not --calibre")
    assert error.__notes__ == ["In Python --memory is memory=... in bytes, --calib is calibration=..."]
    assert "Python" not in str(error)
    assert not hasattr(UsageError("leave out --no-onnx (in Python measure=False)"), "__notes__")
    assert not hasattr(FitError("body.0", "expected numbers"), "__notes__")
    assert in_python("a--calib b") is None
