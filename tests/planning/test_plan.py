"""Plans as values, and what is asked of them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from networks import Chain, Residual, settled
from torch import nn

from convrewrite.errors import PlanError
from convrewrite.meanings import Meaning
from convrewrite.planning.plan import Fingerprint, Plan, PlannedOption, PlannedSite
from convrewrite.results import read_plan
from convrewrite.settings import Constraints, Keep, check_budget, keep_of
from convrewrite.structures.structure import Option

# --- what is asked


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"flops": 0.5}, "'flops': expected one of macs, params, latency"),
        ({"macs": 1.0}, r"macs=1: .*\(0, 1\)"),
        ({"params": 0}, "params=0"),
        ({"macs": 0.5, "latency": float("nan")}, "latency=nan"),
    ],
)
def test_a_wrong_budget_is_an_error(budget: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_budget(budget)
    check_budget({"macs": 0.5, "params": 0.999, "latency": 0.01})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (0.98, Keep("agreement", 0.98)),
        ({"agreement": 0.9}, Keep("agreement", 0.9)),
        ({"error": 0.02}, Keep("error", 0.02)),
        (Keep("error", 0.5), Keep("error", 0.5)),
    ],
)
def test_what_is_to_be_kept(value: "float | dict[str, float] | Keep | None", expected: Keep | None) -> None:
    assert keep_of(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"accuracy": 0.9}, "expected a number such as 0.98, or error=0.02, found accuracy"),
        ({"error": 0.1, "agreement": 0.9}, "found error, agreement"),
        ({}, "found nothing"),
        (1.0, r"expected agreement in \(0, 1\), as in 0.98, found 1"),
        (98, "found 98"),
        (0, "found 0"),
        (float("nan"), "found nan"),
        ({"error": 1.5}, r"expected error in \(0, 1\), as in error=0.02, found 1.5"),
        (Keep("agreement", 98), "found 98"),
        (Keep("error", float("nan")), "found nan"),
        (Keep("accuracy", 0.9), "found accuracy"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_kept(value: "float | dict[str, float] | Keep", message: str) -> None:
    with pytest.raises(PlanError, match=f"keep: .*{message}"):
        keep_of(value)


@pytest.mark.parametrize(
    ("constraints", "by_ratio", "for_speed"),
    [
        (Constraints({}), True, True),
        (Constraints({"macs": 0.5}), False, True),
        (Constraints({"macs": 0.5}, any_speed=True), False, False),
        (Constraints({"macs": 0.5, "latency": 0.5}, any_speed=True), False, True),
        (Constraints({}, Keep("agreement", 0.98)), False, True),
        (Constraints({}, any_speed=True), True, False),
    ],
)
def test_whether_the_result_must_not_be_slower(constraints: Constraints, by_ratio: bool, for_speed: bool) -> None:
    assert (constraints.by_ratio, constraints.for_speed) == (by_ratio, for_speed)


def test_what_is_to_be_kept_is_told_in_words() -> None:
    assert str(Keep("agreement", 0.98)) == "top-1 agreement of at least 0.98"
    assert str(Keep("error", 0.02)) == "relative output error of at most 0.02"


# --- fingerprints


def test_the_fingerprint_is_that_of_the_tensors() -> None:
    model = settled(Chain())
    same = copy.deepcopy(model)
    assert Fingerprint.of(model) == Fingerprint.of(same)
    with torch.no_grad():
        same[0].weight[0, 0, 0, 0] += 1e-6
    assert Fingerprint.of(same).geometry == Fingerprint.of(model).geometry
    assert Fingerprint.of(same).weights != Fingerprint.of(model).weights


def test_buffers_count_and_gradients_and_modes_do_not() -> None:
    model = settled(Chain())
    before = Fingerprint.of(model)
    model.train().requires_grad_(False)
    assert Fingerprint.of(model) == before
    model[1].running_mean += 1
    assert Fingerprint.of(model).weights != before.weights


@pytest.mark.parametrize(
    "other", [Chain(9), Residual(8), Chain(8).double(), nn.Sequential(Chain(8))], ids=lambda m: type(m).__name__
)
def test_names_shapes_and_dtypes_are_the_geometry(other: nn.Module) -> None:
    assert Fingerprint.of(other).geometry != Fingerprint.of(Chain(8)).geometry


def test_every_dtype_has_a_fingerprint() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = Chain().to(dtype)
        assert Fingerprint.of(model) == Fingerprint.of(copy.deepcopy(model))
    model = Chain()
    model.register_buffer("flag", torch.tensor(True))
    model.register_buffer("empty", torch.zeros(0, 3))
    assert Fingerprint.of(model).weights != Fingerprint.of(Chain()).weights


# --- plans


def plan(model: nn.Module) -> Plan:
    option = Option("separable", (("order", "depthwise-first"), ("rank", 2)), "branches")
    return Plan(
        tool_version="1.2.3",
        model=Fingerprint.of(model),
        rules=("late",),
        budget={"macs": 0.5},
        keep={"agreement": 0.98},
        seed=3,
        sites=(
            PlannedSite(name="0", kind="standard", geometry="3->8 3x3", option=None, reason="it is the stem"),
            PlannedSite(
                name="3", kind="standard", geometry="8->8 3x3", option=PlannedOption.of(option), batch_norm="4"
            ),
        ),
    )


def test_a_plan_survives_its_file() -> None:
    first = plan(Chain())
    again = Plan.from_json(first.to_json(), "plan.json")
    assert again == first
    assert again.to_json() == first.to_json()
    assert again.sites[1].option is not None
    assert again.sites[1].option.option() == Option(
        "separable", (("order", "depthwise-first"), ("rank", 2)), "branches"
    )
    assert [site["name"] for site in json.loads(first.to_json())["sites"]] == ["0", "3"]
    assert again.asked() == Constraints({"macs": 0.5}, Keep("agreement", 0.98))


def test_an_option_is_the_same_in_whichever_order_its_parameters_are_written() -> None:
    text = plan(Chain()).to_json()
    assert text.endswith("}\n") and not text.endswith("\n\n")
    written = json.loads(text)
    parameters = written["sites"][1]["option"]["parameters"]
    written["sites"][1]["option"]["parameters"] = dict(reversed(parameters.items()))
    found = Plan.from_json(json.dumps(written), "p.json").sites[1]
    assert found.option is not None
    assert found.option.option().setting == (("order", "depthwise-first"), ("rank", 2))


def test_two_sites_of_one_name_are_refused_and_discrete_outputs_are_recognised_anew() -> None:
    written = json.loads(plan(Chain()).to_json())
    twice = {**written, "sites": [*written["sites"], written["sites"][0]]}
    with pytest.raises(PlanError, match=r"p\.json: sites: .*two sites are called '0'"):
        Plan.from_json(json.dumps(twice), "p.json")
    outputs = {
        "scores": {"kind": "logits", "weight": 2.0, "reason": "it is said"}, "mask": {"kind": "discrete", "reason": "whole"},
    }  # fmt: skip
    found = Plan.from_json(json.dumps({**written, "outputs": outputs}), "p.json").meanings()
    assert found == {"scores": Meaning("logits", "it is said", 2.0)}


def test_a_plan_knows_its_sites() -> None:
    assert [site.becomes for site in plan(Chain()).sites] == [
        "kept: it is the stem", "separable, rank 2, depthwise-first, as branches",
    ]  # fmt: skip
    assert plan(Chain()).site("0").reason == "it is the stem"
    with pytest.raises(PlanError, match="the plan has no site '1'; its sites are 0, 3"):
        plan(Chain()).site("1")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"seed": "x"}, "seed"),
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 2}, "schema_version"),
        ({"sites": [{"name": "0"}]}, r"sites\.0\.kind"),
        ({"model": None}, "model"),
        ({"schema_version": True}, "schema_version"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"budget": {"macs": "0.5"}}, r"budget\.macs"),
        ({"predicted": {"effect": 0, "macs": -0.1, "params": 0.5}}, r"predicted\.macs"),
    ],
)
def test_a_wrong_plan_names_the_file_and_the_entry(change: dict[str, object], where: str) -> None:
    text = json.dumps({**json.loads(plan(Chain()).to_json()), **change})
    with pytest.raises(PlanError, match=rf"p\.json: {where}: .*expected a plan written by this tool"):
        Plan.from_json(text, "p.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {"flops": 0.5}}, "budget 'flops': expected one of macs"),
        ({"budget": {"macs": 2}}, "budget macs=2: "),
        ({"keep": {"accuracy": 0.5}}, "keep: expected a number"),
        ({"keep": {"agreement": 98}}, "keep: expected agreement in"),
    ],
)
def test_a_plan_that_asks_for_what_there_is_not_names_the_file(change: dict[str, object], message: str) -> None:
    text = json.dumps({**json.loads(plan(Chain()).to_json()), **change})
    with pytest.raises(PlanError, match=rf"^p\.json: {message}"):
        Plan.from_json(text, "p.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macs": -1}, r"sites\.0\.macs: .*, found -1; expected a plan"),
        ({"parameters": -1}, r"sites\.0\.parameters: .*, found -1; expected a plan"),
        ({"seconds": -1e-3}, r"sites\.0\.seconds: .*, found -0\.001; expected a plan"),
        ({"macs": "11"}, r"sites\.0\.macs: .*, found '11'; expected a plan"),
        ({"reason": None}, "0: expected an option, or the reason why it is kept, found neither; make a new plan"),
        ({"reason": " "}, "0: expected an option, or the reason why it is kept, found neither; make a new plan"),
    ],
)
def test_a_site_that_says_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    told = json.loads(plan(Chain()).to_json())
    told["sites"][0] |= change
    with pytest.raises(PlanError, match=rf"^p\.json: {message}"):
        Plan.from_json(json.dumps(told), "p.json")


def test_an_entry_that_stands_twice_is_refused() -> None:
    text = plan(Chain()).to_json().replace('"kind":', '"kind": "depthwise",\n"kind":', 1)
    with pytest.raises(
        PlanError, match=r"^p\.json: 'kind': expected once in its object, found more than once; make a new plan"
    ):
        Plan.from_json(text, "p.json")


def test_a_mark_of_an_editor_at_the_beginning_of_a_plan_is_no_fault(tmp_path: Path) -> None:
    made = plan(Chain())
    (tmp_path / "p.json").write_text(made.to_json(), encoding="utf-8-sig")
    assert read_plan(tmp_path / "p.json") == made


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_plan_at_all_is_an_error(text: str) -> None:
    with pytest.raises(PlanError, match=r"p\.json: the file: "):
        Plan.from_json(text, "p.json")


def test_a_plan_belongs_to_its_model() -> None:
    model = settled(Chain())
    made = plan(model)
    made.require_model(model, weights=True)
    other = settled(Chain())
    made.require_model(other, weights=False)
    with pytest.raises(PlanError, match="with other weights"):
        made.require_model(other, weights=True)
    with pytest.raises(PlanError, match=r"another model: .* differ from Residual"):
        made.require_model(Residual(), weights=False)
