"""Plans as values, and budgets."""

import copy
import json

import pytest
import torch
from networks import Chain, Residual, settled
from torch import nn

from convrewrite.conv import Cost
from convrewrite.errors import PlanError
from convrewrite.planning import STEPS, Fingerprint, Plan, PlannedOption, PlannedSite, check_budget, offers_within
from convrewrite.proposing import Menu, Offer, menus, offer_at
from convrewrite.rules import Protect, Rule
from convrewrite.sites import find_sites
from convrewrite.structure import Option, Structure
from convrewrite.tracing import trace

X = torch.zeros(1, 3, 16, 16)


@pytest.fixture
def priced(structures: dict[str, Structure]) -> tuple[tuple[Menu, ...], Cost]:
    """Menus of a small network with a rich choice, and what the whole network costs."""
    model = settled(Residual(16))
    sites = find_sites(model, (X,), trace(model))
    protect = Protect(stem=True, min_channels=0, min_mac_share=0)
    rule = Rule(name="all", structures=("separable", "asymmetric", "channel"), protect=protect, ratio=0.5)
    total = Cost(sum(p.numel() for p in model.parameters()), sum(site.cost.macs for site in sites) + 160)
    return menus(sites, [rule], structures), total


def left(offers: tuple[Offer, ...], totals: Cost, name: str) -> list[float]:
    """Parts of the whole cost that may be left: with the cheapest, and with the most expensive proposals."""
    found = []
    for choose in (min, max):
        before = totals.macs if name == "macs" else totals.parameters
        after = before
        for offer in offers:
            costs = [p.cost.macs if name == "macs" else p.cost.parameters for p in offer.proposals]
            own = offer.site.cost.macs if name == "macs" else offer.site.cost.parameters
            after += (choose(costs) - own) if costs else 0
        found.append(after / before)
    return found


@pytest.mark.parametrize(
    "budget",
    [{"macs": 0.3}, {"macs": 0.5}, {"macs": 0.77}, {"params": 0.4}, {"macs": 0.6, "params": 0.35}, {"macs": 0.95}],
    ids=str,
)
def test_a_budget_is_met_by_the_largest_uniform_ratio(
    priced: tuple[tuple[Menu, ...], Cost], budget: dict[str, float]
) -> None:
    menu_list, totals = priced
    offers = offers_within(menu_list, budget, totals)

    def meets(candidate: tuple[Offer, ...]) -> bool:
        return all(left(candidate, totals, name)[1] <= limit for name, limit in budget.items())

    assert meets(offers), "whichever proposal is chosen at each site"
    every = [tuple(offer_at(menu, step / STEPS) for menu in menu_list) for step in range(1, STEPS)]
    assert offers == [candidate for candidate in every if meets(candidate)][-1]


def test_a_larger_budget_leaves_more(priced: tuple[tuple[Menu, ...], Cost]) -> None:
    menu_list, totals = priced
    parts = [left(offers_within(menu_list, {"macs": b}, totals), totals, "macs")[1] for b in (0.2, 0.4, 0.6, 0.8)]
    assert parts == sorted(parts)
    assert parts[0] < 0.2 < 0.5 < parts[-1]


def test_without_a_budget_the_rules_ratios_hold(priced: tuple[tuple[Menu, ...], Cost]) -> None:
    menu_list, totals = priced
    assert offers_within(menu_list, {}, totals) == tuple(offer_at(menu, None) for menu in menu_list)


def test_an_impossible_budget_says_what_can_be_reached(priced: tuple[tuple[Menu, ...], Cost]) -> None:
    menu_list, totals = priced
    with pytest.raises(PlanError, match=r"macs=0\.01 cannot be met .* they reach macs=0\.\d+ at the least") as caught:
        offers_within(menu_list, {"macs": 0.01}, totals)
    reached = float(str(caught.value).partition("they reach macs=")[2].split()[0])
    offers = offers_within(menu_list, {"macs": reached + 0.001}, totals)
    assert left(offers, totals, "macs")[1] == pytest.approx(reached, abs=0.001)


def test_a_budget_without_any_option_is_impossible(priced: tuple[tuple[Menu, ...], Cost]) -> None:
    _, totals = priced
    with pytest.raises(PlanError, match=r"they reach macs=1\.000"):
        offers_within([], {"macs": 0.9}, totals)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"flops": 0.5}, "'flops': expected one of macs, params"),
        ({"macs": 1.0}, r"macs=1: .*\(0, 1\)"),
        ({"params": 0}, "params=0"),
    ],
)
def test_a_wrong_budget_is_an_error(budget: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_budget(budget)
    check_budget({"macs": 0.5, "params": 0.999})


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


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"seed": "x"}, "seed"),
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 2}, "schema_version"),
        ({"sites": [{"name": "0"}]}, r"sites\.0\.kind"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_plan_names_the_file_and_the_entry(change: dict[str, object], where: str) -> None:
    text = json.dumps({**json.loads(plan(Chain()).to_json()), **change})
    with pytest.raises(PlanError, match=rf"p\.json: {where}: .*expected a plan written by this tool"):
        Plan.from_json(text, "p.json")


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
