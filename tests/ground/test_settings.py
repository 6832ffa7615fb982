import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from convrewrite import Settings, runtime
from convrewrite.errors import ConvRewriteError, PlanError, UsageError
from convrewrite.meanings.kinds import Meaning, WantedOutputs
from convrewrite.runtime.timing import Timer
from convrewrite.settings import FLAG, Constraints, Flag, Keep, SettingsOptions

NAMES = {"Meaning": Meaning, "WantedOutputs": WantedOutputs, "Timer": Timer}
FLAGS: dict[str, tuple[Flag, Any]] = {
    field.name: (field.metadata[FLAG], field.default) for field in fields(Settings) if FLAG in field.metadata
}


def test_the_keyword_arguments_are_the_fields() -> None:
    assert get_type_hints(SettingsOptions, localns=NAMES) == get_type_hints(Settings, localns=NAMES)
    assert not SettingsOptions.__required_keys__


def test_every_field_is_told_of() -> None:
    told = [line.split(":")[0].strip() for line in str(Settings.__doc__).splitlines() if line.startswith(" " * 8)]
    assert {field.name for field in fields(Settings)} <= set(told)


def test_the_page_lists_every_field_with_its_default_and_its_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8").partition("## Settings")[2]
    rows = dict(re.findall(r"^\| `(\w+)[^|]*` \|([^|]*)\|", page.partition("## ")[0], re.MULTILINE))
    assert list(rows) == [field.name for field in fields(Settings)]
    for name, (flag, _) in FLAGS.items():
        assert flag.names[0].rpartition("/")[2] in rows[name]


@pytest.mark.parametrize("name", FLAGS)
def test_what_the_command_line_gives_without_an_option_is_the_default(name: str) -> None:
    flag, default = FLAGS[name]
    given = default if flag.default is None else flag.default
    assert given is None or flag.value(given) == default
    assert flag.check is None or flag.check(given) == given


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("budget", ["macs=0.5", "params=0.6"], {"macs": 0.5, "params": 0.6}), ("keep", "error=0.02", {"error": 0.02}),
        ("free_axes", "batch,width", ("batch", "width")), ("free_axes", "none", ()),
        ("outputs", ["a=logits", "b=values:2"], {"a": ("logits", 1.0), "b": ("values", 2.0)}), ("memory", 0.5, 1 << 29),
    ],
)  # fmt: skip
def test_text_becomes_the_value_of_a_field(name: str, given: object, value: object) -> None:
    flag, _ = FLAGS[name]
    assert flag.value(given) == value
    Settings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"budget": {"watts": 0.5}}, PlanError, "budget 'watts': expected one of macs, params, latency"),
        ({"budget": {"latency": 0.5}, "measure": False}, PlanError, "budget latency: needs measured times"),
        ({"keep": 1.5}, PlanError, r"keep: expected agreement in \(0, 1\)"),
        ({"outputs": {"a": "colours"}}, UsageError, "output a: expected one of"),
        ({"seed": -1}, UsageError, "--seed: expected"),
        ({"threads": 0}, UsageError, "--threads: expected"),
        ({"memory": 1}, UsageError, "memory: expected bytes"),
        (
            {"export": ("tflite",)},
            UsageError,
            "export: expected one of coreml, executorch, half, openvino, torch_export, found",
        ),
        ({"export": "openvino"}, UsageError, r'export: expected names one by one, as \["openvino"\], found'),
        ({"opset": 9}, UsageError, "--opset: expected a whole number from 18"),
        (
            {"free_axes": ("batch", "batch")},
            UsageError,
            "--free-axes: expected none, or each once of batch, height, width",
        ),
        ({"free_axes": "batch"}, UsageError, "--free-axes: expected names one by one"),
        ({"opset": 20, "measure": False}, UsageError, "--opset, --free-axes: expected an ONNX file"),
    ],
)
def test_what_no_run_can_work_with_is_refused_at_once(
    asked: Mapping[str, Any], error: type[ConvRewriteError], words: str
) -> None:
    with pytest.raises(error, match=words):
        Settings(**asked)


def test_the_part_that_a_plan_is_made_for_is_parsed() -> None:
    settings = Settings(budget={"macs": 0.5}, keep=0.98, outputs={"a": "logits"})
    meaning = Meaning("logits", "as asked", 1.0)
    assert settings.constraints == Constraints({"macs": 0.5}, Keep("agreement", 0.98), {"a": meaning})
    assert Settings().constraints == Constraints({})
    assert Settings().clock == runtime.THIS_MACHINE
