"""A plan that was written down gives the same model again, or says why it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import FalseTimer
from networks import Brighter, NineKinds, Residual, natural, settled, state_bytes
from torch import Tensor, nn

import convrewrite
from convrewrite.errors import PlanError, UsageError
from convrewrite.inputs import Inputs
from convrewrite.pipeline.prepare import prepare
from convrewrite.planning.plan import Plan
from convrewrite.planning.planned import shortlists_of
from convrewrite.rewriting.site_fit import UNREACHED
from convrewrite.rules.schema import Protect, Rule
from convrewrite.settings import Keep

FREE = Protect(stem=False, min_channels=0, min_mac_share=0)
RULE = Rule(name="r", structures=("channel", "asymmetric"), protect=FREE, ratio=0.6)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settled(Residual())


def images() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return natural(40, 3, 12, 12, torch.float32)


def again(plan: Plan) -> Plan:
    """Written and read."""
    return Plan.from_json(plan.to_json(), "plan.json")


ASKED: dict[str, dict[str, Any]] = {
    "ratio": {},
    "macs": {"budget": {"macs": 0.5}},
    "params, fast": {"budget": {"params": 0.6}, "fast": True},
    "keep, fast": {"keep": {"error": 0.3}, "fast": True},
    "unweighted": {"budget": {"macs": 0.5}, "output_weighting": False, "fast": True},
    "another seed": {"budget": {"macs": 0.5}, "seed": 5, "fast": True},
}


@pytest.mark.parametrize("name", ASKED)
def test_the_plan_of_a_result_gives_the_result_again(name: str) -> None:
    asked = ASKED[name]
    first = convrewrite.optimize(network(), images()[:1], [RULE], images(), measure=False, **asked)
    weighting = asked.get("output_weighting", True)
    second = convrewrite.apply(
        network(), images()[:1], again(first.plan), images(), measure=False, output_weighting=weighting
    )
    assert any(site.option for site in first.plan.sites)
    assert state_bytes(second.model) == state_bytes(first.model)
    assert second.plan == first.plan
    assert second.report.reached == first.report.reached
    assert second.report.sites == first.report.sites
    assert second.report.fidelity == first.report.fidelity


def test_planning_and_applying_is_optimizing() -> None:
    asked: dict[str, Any] = {"budget": {"macs": 0.5}, "fast": True, "measure": False, "seed": 2}
    made = convrewrite.plan(network(), images()[:1], [RULE], images(), **asked)
    first = convrewrite.optimize(network(), images()[:1], [RULE], images(), **asked)
    assert made == first.plan
    second = convrewrite.apply(network(), images()[:1], again(made), images(), measure=False)
    assert state_bytes(second.model) == state_bytes(first.model)


def test_a_plan_for_latency_keeps_its_lowerings() -> None:
    timer = FalseTimer(
        0.89,
        lambda graph, size: 1e-6 * len(graph[0]) ** -1 * (2 if len(graph) > 1 else 1) * size[0],
        file_seconds=100e-6,
    )
    rule = Rule(name="r", structures=("separable",), protect=FREE)
    first = convrewrite.optimize(
        network(), images()[:1], [rule], images(), {"latency": 0.9}, fast=True, timer=timer
    )  # fmt: skip
    chosen = [site.option for site in first.plan.sites if site.option]
    assert chosen
    assert {option.lowering for option in chosen} == {"chain"}, "which is not the standard one"
    second = convrewrite.apply(network(), images()[:1], again(first.plan), images(), measure=False)
    assert state_bytes(second.model) == state_bytes(first.model)
    assert second.report.reached.budget == {"latency": None}, "nothing was measured"


def test_a_plan_may_be_given_by_its_file(tmp_path: Path) -> None:
    first = convrewrite.optimize(network(), images()[:1], [RULE], "weights", {"macs": 0.6}, measure=False)
    (tmp_path / "plan.json").write_text(first.plan.to_json(), encoding="utf-8")
    for path in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        second = convrewrite.apply(network(), images()[:1], path, "weights", measure=False)
        assert state_bytes(second.model) == state_bytes(first.model)
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        convrewrite.apply(network(), images()[:1], tmp_path / "nowhere.json", "weights", measure=False)
    for wrong in (None, {}, first):
        with pytest.raises(UsageError, match="plan: expected a Plan, or the path of a file with one, found"):
            convrewrite.apply(network(), images()[:1], wrong, "weights", measure=False)  # type: ignore[arg-type]


def test_weights_alone_need_no_inputs() -> None:
    first = convrewrite.optimize(network(), images()[:1], [RULE], "weights", {"macs": 0.6}, measure=False)
    second = convrewrite.apply(network(), images()[:1], again(first.plan), "weights", measure=False)
    assert state_bytes(second.model) == state_bytes(first.model)
    assert "random noise inputs" in (second.report.fidelity_basis or "")


def test_the_fidelity_that_was_to_be_kept_is_asked_of_the_applied_plan() -> None:
    made = convrewrite.plan(
        network(), images()[:1], [RULE], images(), {"macs": 0.4}, keep=Keep("error", 1e-4), fast=True, measure=False
    )
    result = convrewrite.apply(network(), images()[:1], again(made), images(), measure=False)
    assert result.report.asked.keep == "relative output error of at most 0.0001"
    assert result.refused is not None
    assert result.refused.startswith("asked to keep a relative output error of at most 0.0001, measured 0.")
    with pytest.raises(PlanError, match="keep: needs inputs to measure on"):
        convrewrite.apply(network(), images()[:1], made, "weights", measure=False)


@pytest.mark.parametrize("resource", ["macs", "params"])
def test_the_budget_is_asked_of_the_applied_plan(resource: str) -> None:
    made = convrewrite.plan(network(), images()[:1], [RULE], "weights", {resource: 0.6}, measure=False)
    held = convrewrite.apply(network(), images()[:1], again(made), "weights", measure=False)
    assert held.refused is None
    edited = made.model_copy(update={"budget": {resource: 0.01}})
    result = convrewrite.apply(network(), images()[:1], again(edited), "weights", measure=False)
    assert result.refused is not None
    assert result.refused.startswith(f"asked for {resource}=0.01, reached 0.")


class Gated(nn.Module):
    """A gate that works in place on what the backward pass of the gate's own convolution needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x *= torch.sigmoid(self.gate(x))
        return x


def test_a_plan_gives_the_result_again_where_gradients_depend_on_the_sites_they_are_asked_for() -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    first = convrewrite.optimize(model, images()[:1], [RULE], images(), {"macs": 0.8}, measure=False, fast=True)
    assert [bool(site.option) for site in first.plan.sites] == [False, True]
    second = convrewrite.apply(model, images()[:1], again(first.plan), images(), measure=False)
    assert state_bytes(second.model) == state_bytes(first.model)


@pytest.mark.parametrize("budget", [None, {"macs": 0.8}], ids=["ratio", "macs"])
def test_a_site_that_no_input_gets_to_is_kept_in_the_plan_that_comes_back(
    budget: dict[str, float] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, bright, dark = Brighter().eval(), images()[:1] + 1, -images()
    planned = convrewrite.plan(model, bright, [RULE], dark, budget, measure=False)
    assert planned.site("first").option is not None
    assert planned.site("second").option is None
    result = convrewrite.apply(model, bright, planned, dark, measure=False)
    assert result.plan.site("first") == planned.site("first")
    assert (result.plan.site("second").option, result.plan.site("second").reason) == (None, UNREACHED)
    loaded = convrewrite.load(result.save(tmp_path / "out"), Brighter().eval())
    assert torch.equal(loaded(bright), result.model(bright))
    assert state_bytes(result.model.second) == state_bytes(model.second)


def test_a_site_that_the_inputs_of_an_applied_plan_do_not_get_to_is_kept_in_the_plan_of_the_result(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model, bright = Brighter().eval(), images()[:1] + 1
    planned = convrewrite.plan(model, bright, [RULE], "weights", measure=False)
    assert planned.site("second").option is not None
    result = convrewrite.apply(model, bright, planned, -images(), measure=False)
    assert (result.plan.site("second").option, result.plan.site("second").reason) == (None, UNREACHED)
    loaded = convrewrite.load(result.save(tmp_path / "out"), Brighter().eval())
    assert torch.equal(loaded(bright), result.model(bright))


def test_modes_and_random_numbers_come_back() -> None:
    made = convrewrite.plan(network(), images()[:1], [RULE], "weights", measure=False)
    model = network().train()
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    convrewrite.apply(model, images()[:1], made, "weights", measure=False)
    assert torch.equal(torch.rand(2), expected)
    assert all(module.training for module in model.modules())


# --- plans that do not fit


@pytest.fixture(scope="module")
def made() -> Plan:
    torch.manual_seed(0)
    return convrewrite.plan(network(), images()[:1], [RULE], "weights", measure=False)


def applied(plan: Plan, model: nn.Module | None = None) -> None:
    convrewrite.apply(model or network(), images()[:1], again(plan), "weights", measure=False)


def test_another_model_is_refused(made: Plan) -> None:
    with pytest.raises(PlanError, match=r"made for another model: .* differ from NineKinds; give the original model"):
        applied(made, settled(NineKinds()))


def test_other_weights_are_refused(made: Plan) -> None:
    with pytest.raises(PlanError, match="for this architecture with other weights; give the original"):
        applied(made, network(seed=1))


def changed(plan: Plan, name: str, **values: object) -> Plan:
    """The plan with another option at one site."""
    sites = []
    for site in plan.sites:
        if site.name == name:
            assert site.option is not None
            site = site.model_copy(update={"option": site.option.model_copy(update=values)})
        sites.append(site)
    return plan.model_copy(update={"sites": tuple(sites)})


SITE = "blocks.0.conv1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"structure": "butterfly"}, "structure 'butterfly' is not known; known are asymmetric, "),
        ({"structure": "channel", "parameters": {"rank": 0}}, "channel: expected a rank from 1 to 8, found 0"),
        ({"structure": "channel", "parameters": {"rank": 9}}, "channel: expected a rank from 1 to 8, found 9"),
        ({"structure": "channel", "parameters": {}}, "channel: expected a rank from 1 to 8, found None"),
        ({"structure": "channel", "parameters": {"rank": "all"}}, "channel: expected a rank from 1 to 8, found 'all'"),
        ({"structure": "grouped", "parameters": {"rank": 1, "groups": 3}}, r"grouped has no variant \{'groups': 3\}"),
        ({"structure": "channel", "parameters": {"rank": 2, "order": "x"}}, r"channel has no variant \{'order': 'x'\}"),
        (
            {"structure": "channel", "parameters": {"rank": 2}, "lowering": "branches"},
            "channel: expected the lowering chain, found 'branches'",
        ),
        (
            {
                "structure": "separable",
                "parameters": {"rank": 2, "order": "depthwise-first"},
                "lowering": "sum",
            },
            "separable: expected the lowering branches or chain, found 'sum'",
        ),
    ],
    ids=str,
)
def test_an_option_that_there_is_not_is_refused(made: Plan, values: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{SITE}: {message}"):
        applied(changed(made, SITE, **values))


def test_a_structure_that_does_not_take_the_site_is_refused(made: Plan) -> None:
    pointwise = "blocks.1.downsample.0"
    wrong = changed(made, pointwise, structure="asymmetric", parameters={"rank": 2, "order": "vertical-first"})
    with pytest.raises(PlanError, match=rf"^{pointwise}: the plan rewrites it, but .*; make a new plan"):
        applied(wrong)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda sites: [sites[0].model_copy(update={"name": "trunk"}), *sites[1:]], "stem, trunk"),
        (lambda sites: sites[1:], "stem"),
        (lambda sites: [*sites, sites[0].model_copy(update={"name": "blocks.7"})], r"blocks\.7"),
    ],
    ids=["renamed", "missing", "too many"],
)
def test_sites_that_differ_are_named(made: Plan, change: Callable[[Any], Any], names: str) -> None:
    with pytest.raises(PlanError, match=f"the plan and the model differ in their sites: {names}; make a new plan"):
        applied(made.model_copy(update={"sites": tuple(change(made.sites))}))


def test_what_the_plan_keeps_is_kept_with_its_reason(made: Plan) -> None:
    model, inputs = network(), (images()[:1],)
    kept = made.model_copy(
        update={
            "sites": tuple(
                site.model_copy(update={"option": None, "reason": reason})
                for site, reason in zip(made.sites, ["it is precious", None] * 9, strict=False)
            )
        }
    )
    shortlists = shortlists_of(kept, prepared(model, inputs))
    assert [shortlist.reason for shortlist in shortlists[:2]] == ["it is precious", "the plan keeps it"]
    assert all(shortlist.candidates == () for shortlist in shortlists)


def prepared(model: nn.Module, inputs: Inputs) -> Any:
    return prepare(model, inputs, ())


def test_shortlists_cost_what_is_built(made: Plan) -> None:
    ready = prepared(network(), (images()[:1],))
    result = convrewrite.apply(network(), images()[:1], made, "weights", measure=False)
    saved = sum(
        shortlist.site.cost.parameters - shortlist.candidates[0].cost.parameters
        for shortlist in shortlists_of(made, ready)
        if shortlist.candidates
    )
    counts = [sum(p.numel() for p in model.parameters()) for model in (network(), result.model)]
    assert counts[0] - counts[1] == saved > 0
