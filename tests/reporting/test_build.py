"""Which results are no success, though everything ran."""

import math
from dataclasses import replace

import pytest
import torch
from clocks import compared

from convrewrite.calibration.batches import Calibration
from convrewrite.conv import Cost
from convrewrite.meanings.fidelity import Fidelity, OutputFidelity
from convrewrite.reporting.build import _kept, _totals
from convrewrite.reporting.verdict import refused, unheld, useless
from convrewrite.runtime.measurement import Measured
from convrewrite.settings import Constraints, Keep

OUTPUTS = (
    OutputFidelity("scores", 0.1, 0.95, 0.01),
    OutputFidelity("more", 0.2, 0.99, 0.02),
    OutputFidelity("map", 0.3),
)


def measured(ratio: float | None = 0.5, outputs: tuple[OutputFidelity, ...] = OUTPUTS) -> Measured:
    return Measured(Fidelity(outputs, 20), "", onnx_latency=None if ratio is None else compared(ratio)())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (None, None),
        (Keep("agreement", 0.95), None),
        (
            Keep("agreement", 0.96),
            "asked to keep a top-1 agreement of at least 0.96, measured 0.95; give the budget more room",
        ),
        (Keep("error", 0.3), None),
        (
            Keep("error", 0.29),
            "asked to keep a relative output error of at most 0.29, measured 0.3; give the budget more room",
        ),
    ],
)
def test_the_worst_output_is_held_to_what_was_to_be_kept(keep: Keep | None, message: str | None) -> None:
    assert refused(Constraints({"macs": 0.5}, keep), measured(), None, {}) == message
    assert refused(Constraints({"params": 0.5}, keep), measured(None), None, {}) == message, "time was not measured"


def test_what_was_kept_is_told_in_the_words_of_what_was_asked() -> None:
    fidelity = measured().fidelity
    assert _kept(Constraints({}), fidelity) is None
    assert _kept(Constraints({}, Keep("agreement", 0.9)), fidelity) == "top-1 agreement of 0.95"
    assert _kept(Constraints({}, Keep("error", 0.9)), fidelity) == "relative output error of 0.3"
    near = Fidelity((OutputFidelity("a", 0.050004, 0.97996, 0.1),), 20)
    assert _kept(Constraints({}, Keep("agreement", 0.98)), near) == "top-1 agreement of 0.97996"
    assert _kept(Constraints({}, Keep("error", 0.05)), near) == "relative output error of 0.050004"


@pytest.mark.parametrize(("saving", "there", "elsewhere"), [(None, None, None), (0.25, 0.75, 1.5), (1.0, None, None)])
def test_what_options_promise_is_a_time_where_any_is_left(
    saving: float | None, there: float | None, elsewhere: float | None
) -> None:
    costs = Cost(10, 100), Cost(5, 40)
    found = _totals(*costs, replace(measured(), predicted_saving=saving))
    assert found.onnx_latency_seconds is not None and found.onnx_latency_seconds.before == 1.0
    assert (found.predicted_onnx_latency_seconds, found.predicted_in) == (there, None)
    known = replace(measured(None), predicted_saving=saving, original_seconds=2.0, original_runtime="tensorrt")
    found = _totals(*costs, known)
    assert (found.predicted_onnx_latency_seconds, found.predicted_in) == (elsewhere, elsewhere and "tensorrt")


@pytest.mark.parametrize(
    ("outputs", "limit"),
    [
        ((OutputFidelity("scores", 0.9, 0.5, 1.0), OUTPUTS[1]), "0.98"),
        ((OutputFidelity("scores", 0.9, 0.5, 1.0), OUTPUTS[2]), "error=0.05"),
        ((OUTPUTS[0], OutputFidelity("map", math.inf)), "error=0.05"),
        ((OutputFidelity("scores", 0.9, 0.95, 0.1),), "error=0.05"),
        ((OUTPUTS[0], OutputFidelity("index", 0.5, equal_share=0.5)), "error=0.05"),
    ],
    ids=["classes", "classes and a map", "a map", "scores whose classes agree", "an index"],
)
def test_the_fidelity_that_would_help_is_one_of_what_was_lost(outputs: tuple[OutputFidelity, ...], limit: str) -> None:
    data = Calibration(((torch.zeros(1, 3),),), (), "data", "a test")
    told = useless(Constraints({"macs": 0.5}), measured(0.5, outputs), data, fast=False)
    assert told is not None and f"or to plan with --keep {limit} instead of a budget, which" in told
    assert told.endswith(", or to plan with a larger budget than macs=0.5")


@pytest.mark.parametrize(("left", "advised"), [(0.34, "macs=0.7"), (0.75, "macs=0.8"), (0.97, None)])
def test_a_budget_that_would_save_more_is_not_advised(left: float, advised: str | None) -> None:
    data = Calibration(((torch.zeros(1, 3),),), (), "data", "a test")
    told = useless(Constraints({}), measured(0.5, (OutputFidelity("map", 0.5),)), data, fast=False, left=left)
    assert told is not None
    assert told.endswith("rules that save less" if advised is None else f"or with a budget (--budget {advised})")


def test_a_fidelity_is_advised_without_the_budget_that_kept_it_from_being_reached() -> None:
    data = Calibration(((torch.zeros(1, 3),),), (), "data", "a test")
    lost = measured(0.5, (OutputFidelity("map", 0.5, unexplained=0.76),))
    for budget, advice in (({"macs": 0.15}, "(--keep) instead of a budget, or"), ({}, "(--keep), or to plan by rules")):
        told = useless(Constraints(budget, Keep("error", 0.05)), lost, data, fast=False)
        assert told is not None and advice in told
    for budget, advice in (({"macs": 0.15}, "give the budget more room"), ({}, "make a new plan, with more inputs")):
        assert str(refused(Constraints(budget, Keep("error", 0.05)), lost, None, {})).endswith(advice)


def test_an_agreement_that_is_kept_does_not_hide_what_else_is_lost() -> None:
    kept, lost = Keep("agreement", 0.9), (OUTPUTS[0], OutputFidelity("map", math.inf))
    (told,) = unheld(Constraints({}, kept), Fidelity(lost, 20))
    assert "top-1 agreement of at least 0.9" in told and "relative output error of map inf %" in told
    assert unheld(Constraints({}, kept), Fidelity(OUTPUTS[:2], 20)) == (), "what is left of class scores was said"
    assert (
        unheld(Constraints({}, Keep("error", 0.9)), Fidelity(lost, 20))
        == unheld(Constraints({}), Fidelity(lost, 20))
        == ()
    )


@pytest.mark.parametrize(
    ("constraints", "no_success"),
    [
        (Constraints({}), True),
        (Constraints({"latency": 0.5}), True),
        (Constraints({"latency": 0.5, "macs": 0.5}), True),
        (Constraints({}, Keep("agreement", 0.5)), True),
        (Constraints({"macs": 0.5}), True),
        (Constraints({"params": 0.5, "macs": 0.5}, any_speed=True), False),
        (Constraints({"params": 0.5}, Keep("agreement", 0.5), any_speed=True), False),
    ],
    ids=str,
)
def test_slower_is_no_success_where_time_matters(constraints: Constraints, no_success: bool) -> None:
    found = refused(constraints, measured(1.5), None, {})
    assert (found is not None) == no_success
    assert found is None or found.startswith("the rewritten model is slower than the original: 1.50 of its time")
    budget = constraints.budget.get("latency", 1.0)
    assert refused(constraints, measured(0.99 * budget), None, {}) is None
    assert budget < 1 or refused(constraints, measured(1.005), None, {}) is None, (
        "a quarter of the rounds found it faster"
    )


def test_what_is_slower_is_told_what_was_not_tried_yet() -> None:
    found = [
        str(refused(constraints, measured(1.5), None, {}, rules))
        for constraints, rules in (
            (Constraints({}), ("separable",)),
            (Constraints({"macs": 0.5}), ("balanced",)),
            (Constraints({"latency": 0.5}, any_speed=True), ("balanced",)),
        )
    ]
    assert found[0].endswith(
        "; plan with --rule balanced --budget latency=0.6, or with --any-speed if time does not matter"
    )
    assert found[1].endswith("; plan with --budget latency=0.6, or with --any-speed if time does not matter")
    assert found[2].endswith("; ask for less latency, or repeat the run on a quieter machine")


@pytest.mark.parametrize(("ratio", "no_success"), [(0.5, False), (0.54, False), (0.56, True), (0.99, True)])
def test_a_latency_budget_is_held_to_what_was_measured(ratio: float, no_success: bool) -> None:
    found = refused(Constraints({"latency": 0.5}), measured(ratio), None, {})
    assert (found is not None) == no_success
    assert found is None or found.startswith(f"asked for latency=0.5, measured {ratio:.2f} of the original's time")


@pytest.mark.parametrize(
    ("reached", "message"),
    [
        ({"macs": 0.5, "params": 0.6, "latency": None}, None),
        ({"macs": 0.5004, "params": 0.9}, None),
        ({"macs": 0.51, "params": 0.4}, "asked for macs=0.5, reached 0.51 of the original's; the rows of sites"),
    ],
)
def test_a_budget_is_held_to_what_was_counted(reached: dict[str, float | None], message: str | None) -> None:
    found = refused(Constraints({"macs": 0.5}), measured(), None, reached)
    assert found is None if message is None else str(found).startswith(message)
    parameters = refused(Constraints({"params": 0.5}), measured(), None, reached)
    assert (parameters is None) == (reached["params"] == 0.4)


def test_what_was_measured_is_told_in_digits_that_show_the_miss() -> None:
    slower = replace(measured(), onnx_latency=replace(compared(1.003)(), ratio_low=1.001))
    assert "original: 1.003 of its time" in str(refused(Constraints({}), slower, None, {}))
    near = (OutputFidelity("a", 0.050021, 0.97996, 0.1),)
    for constraints, reached, told in (
        (Constraints({"macs": 0.25}), {"macs": 0.25031}, "asked for macs=0.25, reached 0.2503 of"),
        (Constraints({"params": 0.01}), {"params": 0.01004}, "asked for params=0.01, reached 0.01004 of"),
        (
            Constraints({}, Keep("error", 0.05)),
            {},
            "asked to keep a relative output error of at most 0.05, measured 0.050021;",
        ),
        (
            Constraints({}, Keep("agreement", 0.98)),
            {},
            "asked to keep a top-1 agreement of at least 0.98, measured 0.97996;",
        ),
    ):
        assert str(refused(constraints, measured(0.5, near), None, reached)).startswith(told)
