import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from clocks import FalseTimer

from convrewrite import Settings, runtime
from convrewrite.errors import ConvRewriteError, PlanError, UsageError
from convrewrite.meanings.kinds import Meaning, WantedOutputs
from convrewrite.pipeline.keywords import OptimizeKeywords, ReportKeywords
from convrewrite.runtime.timing import Timer
from convrewrite.settings import FLAG, Constraints, Flag, Keep, Recovery, RecoveryOptions

NAMES = {"Meaning": Meaning, "WantedOutputs": WantedOutputs, "Timer": Timer}
FLAGS: dict[str, tuple[Flag, Any]] = {
    field.name: (field.metadata[FLAG], field.default) for field in fields(Settings) if FLAG in field.metadata
}


@pytest.mark.parametrize(
    ("options", "others", "settings"),
    [(OptimizeKeywords, ReportKeywords, Settings), (RecoveryOptions, None, Recovery)],
)
def test_the_keyword_arguments_are_the_fields(options: Any, others: Any, settings: type) -> None:
    known = dict(get_type_hints(settings, localns=NAMES))
    if others is not None:  # the entry point names these itself
        known = {name: kind for name, kind in known.items() if name not in ("budget", "seed")}
        known |= get_type_hints(others)
    assert get_type_hints(options, localns=NAMES) == known
    assert not options.__required_keys__


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
        ({"budget": {"mac": 0.5}}, PlanError, r"as in macs=0.5; did you mean macs\?"),
        ({"budget": {"latency": 0.5}, "measure": False}, PlanError, "budget latency: needs measured times"),
        ({"keep": 1.5}, PlanError, r"keep: expected agreement in \(0, 1\)"),
        ({"keep": {0: 0.5}}, PlanError, "keep: expected a number such as 0.98, or error=0.02, found 0"),
        ({"keep": {"eror": 0.5}}, PlanError, r"found eror; did you mean error\?"),
        ({"outputs": {"a": "value"}}, UsageError, r"found 'value'; did you mean values\?"),
        ({"export": "torch-export"}, UsageError, r"found 'torch-export'; did you mean torch_export\?"),
        ({"outputs": {"a": "colours"}}, UsageError, "output a: expected one of"),
        ({"seed": -1}, UsageError, "^seed: expected"),
        ({"threads": 0}, UsageError, "^threads: expected"),
        ({"memory": 1}, UsageError, "memory: expected bytes"),
        (
            {"export": ("tflite",)},
            UsageError,
            "export: expected one of coreml, executorch, half, openvino, torch_export, found",
        ),
        ({"opset": 9}, UsageError, "--opset: expected a whole number from 18"),
        (
            {"free_axes": ("batch", "batch")},
            UsageError,
            "^free_axes: expected none, or each once of batch, height, width",
        ),
        ({"free_axes": "width,"}, UsageError, "^free_axes: expected none, or each once of batch, height, width"),
        ({"opset": 20, "measure": False}, UsageError, "--opset, --free-axes: expected an ONNX file"),
        (
            {"timings": "t.json", "measure": False},
            UsageError,
            "--timings: expected options to be chosen by times, found --no-onnx",
        ),
        (
            {"runtime": "torch", "measure": False},
            UsageError,
            "--runtime 'torch': expected something to be timed and held to torch there, found --no-onnx",
        ),
    ],
)
def test_what_no_run_can_work_with_is_refused_at_once(
    asked: Mapping[str, Any], error: type[ConvRewriteError], words: str
) -> None:
    with pytest.raises(error, match=words):
        Settings(**asked)


WRONG: dict[str, tuple[object, ...]] = {
    "budget": (0.5, "macs=0.5", [0.5], {}, {"macs": "a"}, {"macs": math.nan}, {"macs": True}, {3: 0.5}),
    "keep": ("x", True, {"error": "a"}, math.nan, [0.9], type("Keep", (), {})()),
    "outputs": ("logits", {"a": 3}, {"a": ("logits", "b")}, {3: "logits"}),
    "seed": (1.5, "1", None, True),
    "memory": ("4", 1e9, True),
    "threads": ("2", 1.5, None),
    "timeout": ("1", None, math.nan),
    "free_axes": (3, [3]),
    "device": (3,),
    "timings": (3,),
    "timer": (3,),
    "opset": ("18", 18.5),
    "runtime": (3, None),
    **dict.fromkeys(("exclude", "only", "export"), (3, [3], {"a": 1}, b"a", None)),
    "refine": ("no", 1),
    **dict.fromkeys(("fast", "any_speed", "int8", "output_weighting", "measure", "resume", "half"), ("yes", 0, None)),
}


def test_every_field_is_held_to_its_kind() -> None:
    assert WRONG.keys() == {field.name for field in fields(Settings)}
    for name, found in ((name, value) for name, values in WRONG.items() for value in values):
        with pytest.raises(UsageError, match=rf"^(output a|{name})\b.*: expected ") as refused:
            Settings(**{name: found})  # type: ignore[arg-type]
        assert "--" not in str(refused.value)


@pytest.mark.parametrize("name", ["exclude", "only", "export"])
def test_text_is_one_name(name: str) -> None:
    assert getattr(Settings(**{name: "openvino"}), name) == ("openvino",)  # type: ignore[arg-type]
    assert getattr(Settings(**{name: ["openvino"]}), name) == ("openvino",)  # type: ignore[arg-type]


def test_names_of_axes_may_be_read_once_only() -> None:
    assert Settings(free_axes=iter(["batch", "width"])).free_axes == ("batch", "width")  # type: ignore[arg-type]
    assert Settings(free_axes="width").free_axes == ("width",)


def test_numbers_of_numpy_become_plain_ones() -> None:
    settings = Settings(seed=np.int64(3), timeout=np.float32(2), opset=np.int32(18))  # type: ignore[arg-type]
    assert [type(value) for value in (settings.seed, settings.timeout, settings.opset)] == [int, float, int]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("epochs", "a"), ("minutes", True), ("rate", -1), ("rate", "fast"), ("batch", 1.5), ("batch", 0), ("features", None),
        ("temperature", "1"), ("temperature", 0), ("features", -1), ("everything", "yes"), ("seed", 1.5), ("threads", "2"),
        ("memory", "4"), ("outputs", "logits"), ("timeout", "1"), ("measure", 0), ("device", 3), ("timer", 3),
    ],
)  # fmt: skip
def test_a_recovery_is_held_to_its_kinds(name: str, found: object) -> None:
    with pytest.raises(UsageError, match=f"^{name}: expected .*, found "):
        Recovery(**{name: found})  # type: ignore[arg-type]


def test_the_part_that_a_plan_is_made_for_is_parsed() -> None:
    settings = Settings(budget={"macs": 0.5}, keep=0.98, outputs={"a": "logits"})
    meaning = Meaning("logits", "as asked", 1.0)
    assert settings.constraints == Constraints({"macs": 0.5}, Keep("agreement", 0.98), {"a": meaning})
    assert Settings().constraints == Constraints({})
    assert Settings().clock == runtime.THIS_MACHINE


def test_a_timer_that_has_noted_nothing_yet_is_the_one_that_measures() -> None:
    class Noting(FalseTimer):
        def __len__(self) -> int:
            return len(self.timed)

    timer = Noting()
    assert Settings(timer=timer).clock is timer
    assert Recovery(timer=timer, epochs=1).clock is timer
