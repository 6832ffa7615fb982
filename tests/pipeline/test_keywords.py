import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import FalseTimer
from commands import images, small_network
from torch import fx

import convrewrite
from convrewrite import RewriteConvolutions, Settings, analyze, apply, load, optimize, plan, sweep
from convrewrite.errors import CalibrationError, PlanError, UsageError
from convrewrite.pipeline.keywords import (
    KINDS,
    Extras,
    RecoverKeywords,
    RecoveryExtras,
    ReportKeywords,
    RunKeywords,
    asked_of,
)
from convrewrite.rules import Rule
from convrewrite.settings import Recovery, RecoveryOptions
from convrewrite.structures.families.channel import Channel

EXAMPLE = images(1)
ASKED: dict[str, Any] = {
    "budget": {"macs": 0.6},
    "seed": 5,
    "fast": True,
    "measure": False,
    "outputs": {"output": "logits"},
}


def parameters(entry: object) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(entry).parameters)  # type: ignore[arg-type]


def test_one_value_is_the_same_as_its_fields() -> None:
    settings = Settings(**ASKED)
    first = plan(small_network(), EXAMPLE, ["separable"], images(), **ASKED)
    assert first.seed == 5
    assert plan(small_network(), EXAMPLE, ["separable"], images(), settings=settings) == first
    assert plan(small_network(), EXAMPLE, ["separable"], images(), {"macs": 0.6}, 5, **{
        name: value for name, value in ASKED.items() if name not in ("budget", "seed")
    }) == first  # fmt: skip


def test_the_plan_says_what_is_chosen_and_with_which_seed() -> None:
    made = plan(small_network(), EXAMPLE, ["separable"], images(), **ASKED)
    other = Settings(budget={"params": 0.9}, seed=9, measure=False, threads=2)
    report = apply(small_network(), EXAMPLE, made, images(), settings=other).report
    assert (report.seed, report.asked.budget, report.threads) == (5, {"macs": 0.6}, 2)
    same = apply(
        small_network(), EXAMPLE, made, images(), settings=replace(other, exclude=("gone",), only=("gone",))
    ).report
    assert [site.action for site in same.sites] == [site.action for site in report.sites]


def test_int8_takes_inputs_and_is_of_no_account_where_nothing_is_bettered() -> None:
    asked = Settings(int8=True, measure=False, fast=True)
    with pytest.raises(CalibrationError, match="int8: expected inputs to calibrate and to judge on, found none"):
        optimize(small_network(), EXAMPLE, ["separable"], "weights", settings=asked)
    made = plan(small_network(), EXAMPLE, ["separable"], "weights", settings=asked)
    assert apply(small_network(), EXAMPLE, made, "weights", settings=asked).report.sites


def test_forms_of_a_result_are_of_no_account_where_none_is_written() -> None:
    asked = Settings(export=("torch_export",), half=True, measure=False, fast=True)
    assert plan(small_network(), EXAMPLE, ["separable"], "weights", settings=asked).sites
    assert sweep(small_network(), EXAMPLE, ["separable"], images(), [0.9], settings=asked).report.models


def test_a_timer_is_handed_in() -> None:
    timer = FalseTimer(0.5, lambda graph, _size: 1.0 if len(graph[0]) == 1 else 0.5)
    made = plan(small_network(), EXAMPLE, ["separable"], images(), {"latency": 0.9}, fast=True, timer=timer)
    seconds = {option.seconds for site in made.sites for option in site.considered}
    assert seconds == {0.5}


@pytest.mark.parametrize("given", [{"fast": True}, {"seed": 0}, {"budget": {"macs": 0.5}}])
def test_settings_stand_alone(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"settings: expected alone, found {next(iter(given))} beside it"):
        optimize(small_network(), EXAMPLE, settings=Settings(), **given)


@pytest.mark.parametrize("given", [3, {"fast": True}, Recovery()])
def test_settings_are_settings(given: Any) -> None:
    with pytest.raises(
        UsageError, match=rf"^settings: expected convrewrite\.Settings.*, found {type(given).__name__}; make"
    ):
        optimize(small_network(), EXAMPLE, settings=given)
    with pytest.raises(UsageError, match=r"^settings: expected convrewrite\.Recovery.*, found Settings; make"):
        asked_of(Settings(), {})  # type: ignore[arg-type]


WRONG: dict[str, tuple[Any, ...]] = {
    "structures": (3, [3], None), "progress": (3,), "name": (3,), "notes": (3, [3], None), "augment": (3,), "labels": ([3],),
    "checkpoint": (3,), "resume": ("yes", None), "reading": (3,),
}  # fmt: skip


@pytest.mark.parametrize("kind", [Extras, RecoveryExtras])
def test_what_is_no_setting_is_held_to_its_kind(kind: type) -> None:
    names = [field.name for field in fields(kind)]
    assert set(names) <= WRONG.keys()
    for name, found in ((each, value) for each in names for value in WRONG[each]):
        with pytest.raises(UsageError, match=rf"^{name}: expected .*, found .*; give one, or leave it out"):
            kind(**{name: found})


def test_what_is_no_setting_is_a_keyword_all_the_same() -> None:
    assert {field.name for field in fields(Extras)} == ReportKeywords.__annotations__.keys()
    extras = {field.name for field in fields(RecoveryExtras)}
    assert extras == RecoverKeywords.__annotations__.keys() - RecoveryOptions.__annotations__.keys()
    assert KINDS.keys() == {field.name for kind in (Extras, RecoveryExtras) for field in fields(kind)}


def test_what_is_no_setting_may_stand_beside_them() -> None:
    said = {"name": "mine", "notes": ["a note"], "progress": None, "structures": ()}
    report = optimize(small_network(), EXAMPLE, calibration="weights", settings=Settings(measure=False), **said).report
    assert report.model == "mine"
    assert "a note" in report.notes


class Mine(Channel):
    name = "mine"


def test_a_structure_of_the_callers_own_is_known_wherever_it_is_given(tmp_path: Path) -> None:
    model, rule, own = small_network(), Rule(name="r", structures=("mine",), ratio=0.5), [Mine()]
    assert any(row.applies == {"r": "yes"} for row in analyze(model, EXAMPLE, [rule], own))
    made = plan(model, EXAMPLE, [rule], "weights", structures=own, measure=False)
    assert {site.option.structure for site in made.sites if site.option is not None} == {"mine"}
    folder = apply(model, EXAMPLE, made, "weights", structures=own, measure=False).save(tmp_path / "out")
    loaded = load(folder, model, own)
    assert torch.equal(loaded(EXAMPLE), torch.load(folder / "model.pt", weights_only=False)(EXAMPLE))
    with pytest.raises(PlanError, match="mine"):
        load(folder, model)


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("optimize", "fastt"), ("plan", "name"), ("plan", "int8"), ("sweep", "int8"), ("sweep", "keep"), ("apply", "keep"),
        ("plan", "export"), ("sweep", "export"), ("sweep", "half"),
        ("apply", "exclude"), ("apply", "only"), ("RewriteConvolutions", "model"),
    ],
)  # fmt: skip
def test_other_names_are_a_type_error(entry: str, name: str) -> None:
    arguments = [None] * (1 if entry == "RewriteConvolutions" else 3)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        getattr(convrewrite, entry)(*arguments, **{name: None})


def test_signatures_show_every_field_with_its_default() -> None:
    found = parameters(optimize)
    assert {field.name for field in (*fields(Settings), *fields(Extras))} <= found.keys()
    assert found["memory"].default == Settings().memory
    assert found["name"].default is None
    assert {*RunKeywords.__annotations__} <= parameters(plan).keys()
    assert not {"budget", "keep", "seed", "fast"} & parameters(apply).keys()
    assert "name" not in parameters(plan)


def test_a_pass_holds_its_settings_and_can_be_replaced() -> None:
    rewrite = RewriteConvolutions(EXAMPLE, ["separable"], "weights", keep=0.9, name="mine")
    assert rewrite.settings == Settings(keep=0.9, measure=False)
    other = replace(rewrite, settings=Settings(measure=False))
    assert (other.name, other.settings.keep) == ("mine", None)
    assert isinstance(other(fx.symbolic_trace(small_network())), fx.GraphModule)
    with pytest.raises(AttributeError):
        rewrite.name = "other"  # type: ignore[misc]
