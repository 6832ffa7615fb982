"""A plan for the terminal."""

import pytest

from convrewrite.planning.plan import Considered, Fingerprint, Plan, PlannedOption, PlannedSite, Predicted
from convrewrite.reporting.plan_text import render_plan, render_site
from convrewrite.tables import WIDTH

CHOSEN = PlannedOption(structure="separable", parameters={"order": "depthwise-first", "rank": 2}, lowering="branches")
OTHER = PlannedOption(structure="channel", parameters={"rank": 8}, lowering="chain")

SITE = PlannedSite(
    name="layer1.0", kind="standard", geometry="16->16 3x3 p1", option=CHOSEN, batch_norm="layer1.1",
    macs=2000, parameters=1000, seconds=40e-6,
    considered=(
        Considered(option=CHOSEN, macs=700, parameters=400, seconds=20e-6, error=0.132, effect=0.00123),
        Considered(option=OTHER, macs=1000, parameters=500, seconds=44e-6, reason="changes the measured time by +10%"),
    ),
)  # fmt: skip
KEPT = PlannedSite(name="0.10", kind="pointwise", geometry="16->4 1x1", option=None, reason="kind is pointwise")


def plan(**values: object) -> Plan:
    return Plan(**{
        "tool_version": "1", "model": Fingerprint(geometry="g", weights="w"), "rules": ("r",), "budget": {}, "seed": 0,
        "sites": (SITE, KEPT), **values,
    })  # type: ignore[arg-type]  # fmt: skip


def words(text: str) -> list[str]:
    """The lines of a table without its padding."""
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "asked: the ratio of each rule"),
        ({"budget": {"macs": 0.5, "latency": 0.25}}, "asked: macs=0.5, latency=0.25"),
        ({"keep": {"agreement": 0.98}}, "asked: keep top-1 agreement of at least 0.98"),
        (
            {"budget": {"params": 0.5}, "keep": {"error": 0.02}},
            "asked: params=0.5, keep relative output error of at most 0.02",
        ),
    ],
)
def test_what_was_asked_comes_first(values: dict[str, object], line: str) -> None:
    assert render_plan(plan(**values)).splitlines()[0] == line


def test_what_a_plan_promises_is_told() -> None:
    promised = Predicted(effect=0.01234, macs=0.49876, params=0.6)
    assert "promised: macs 0.499, params 0.600; effect on the outputs 0.012\n" in render_plan(plan(predicted=promised))
    timed = promised.model_copy(update={"latency": 0.55})
    assert "params 0.600, latency 0.550; effect" in render_plan(plan(predicted=timed))
    assert "promised" not in render_plan(plan())


def test_every_site_has_its_row() -> None:
    rows = words(render_plan(plan()))
    assert "layer1.0 standard 16->16 3x3 p1 0.35x rank 2 [1]" in rows
    assert "0.10 pointwise 16->4 1x1 kept [2]" in rows
    assert rows[-2:] == ["[1] separable, depthwise-first, as branches", "[2] kind is pointwise"]


def test_a_wider_terminal_shows_plans_in_words() -> None:
    rows = words(render_plan(plan(), width=100))
    assert "layer1.0 standard 16->16 3x3 p1 0.35x separable, rank 2, depthwise-first, as branches" in rows
    assert rows[-1] == "0.10 pointwise 16->4 1x1 kept: kind is pointwise"


def test_names_that_look_like_numbers_stay_names() -> None:
    sites = tuple(KEPT.model_copy(update={"name": name}) for name in ("0.10", "1e3", "007"))
    names = [row.split()[0] for row in words(render_plan(plan(sites=sites))) if " pointwise " in row]
    assert names == ["0.10", "1e3", "007"]


def test_long_reasons_are_wrapped() -> None:
    reason = "kept for a reason that takes very many words to tell " * 4
    text = render_plan(plan(sites=(SITE, KEPT.model_copy(update={"reason": reason}))))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert " ".join(reason.split()[:6]) in text


def test_a_site_shows_all_that_was_measured_there() -> None:
    text = render_site(SITE)
    rows = words(text)
    assert rows[0] == "layer1.0: standard 16->16 3x3 p1"
    assert rows[1] == "separable, rank 2, depthwise-first, as branches"
    at = rows.index("> separable, rank 2, 0.35x 0.40x 20.0 us 0.50x 13.2 % 0.0012")
    assert " ".join(rows[at + 1 :]).startswith("depthwise-first, as branches ")
    assert "channel, rank 8 0.50x 0.50x 44.0 us 1.10x [1]" in rows
    assert "[1] changes the measured time by +10%" in rows
    assert " ".join(text.split()).endswith(
        "is the KL of class scores and probabilities, the part of the variance of values that is lost, or the squared distance "
        "of embeddings; of several outputs the weighted mean."
    )
    assert max(map(len, text.splitlines())) <= WIDTH


def test_a_site_where_nothing_was_measured_says_no_more_than_it_knows() -> None:
    assert render_site(KEPT) == "0.10: pointwise 16->4 1x1\nkept: kind is pointwise"
    bare = Considered(option=CHOSEN, macs=700, parameters=400)
    text = render_site(SITE.model_copy(update={"considered": (bare,)}))
    assert "> separable, rank 2, depthwise-first, as branches 0.35x 0.40x" in words(text)
    assert "effect is the KL" not in text
    assert text.splitlines()[3].split() == ["option", "MACs", "param."]


def test_names_that_are_written_out_keep_the_columns() -> None:
    strange = KEPT.model_copy(update={"name": "a\x1b[31m"})
    lines = render_plan(plan(sites=(SITE, strange))).splitlines()
    (shown,) = [line for line in lines if line.startswith("a\\x1b[31m ")]
    (head,) = [line for line in lines if line.startswith("site ")]
    assert shown.index("pointwise") == head.index("kind")
