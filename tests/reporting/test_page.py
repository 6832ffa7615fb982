"""The page of a result in a browser: it asks for nothing, shows the numbers of its JSON, and everyone can use it."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from convrewrite.errors import UsageError
from convrewrite.planning import Considered, Plan, PlannedSite
from convrewrite.planning.plan import Fingerprint, PlannedOption, Predicted
from convrewrite.reporting.html import render_analysis, render_html, render_summary
from convrewrite.reporting.page import MOST_RULED_OUT, _why, view_of
from convrewrite.reporting.report import (
    AnalysisRow,
    Asked,
    CalibrationSummary,
    Change,
    Environment,
    LatencyChange,
    OutputFidelityRow,
    Reached,
    Report,
    SiteRow,
    Totals,
)
from convrewrite.results import Analysis

EVIL = '"><script>document.title="owned"</script><img src=x onerror=alert(1)>\x1b[2J'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CP, CHANNEL = ("cp", {"rank": 4}), ("channel", {"rank": 2})
COSTS = {"stem": 400, "body.0": 9000, "body.1": 6000, "head": 800}
"""MACs of the four sites of the network."""


def option(structure: str, parameters: dict[str, int | str]) -> PlannedOption:
    return PlannedOption(structure=structure, parameters=parameters, lowering="chain")


def considered(chosen: tuple[str, dict[str, int | str]], macs: int, seconds: float) -> tuple[Considered, ...]:
    """One that is taken, a dearer one that harms less, a cheaper one that harms more, and many that were never in question."""
    common = {"parameters": 30}
    return (
        Considered(option=option(*chosen), macs=macs // 3, seconds=seconds / 2, error=0.02, effect=1e-3, **common),
        Considered(option=option("asymmetric", {"rank": 9}), macs=macs // 2, seconds=seconds / 1.5, error=0.01, effect=1e-4,
                   **common),
        Considered(option=option("tucker", {"rank": 1}), macs=macs // 9, seconds=seconds / 4, error=0.3, effect=0.1, **common),
        *(
            Considered(option=option("grouped", {"rank": n}), macs=macs, seconds=seconds, reason=f"no gain {EVIL}", **common)
            for n in range(MOST_RULED_OUT + 3)
        ),
    )  # fmt: skip


def planned() -> Plan:
    sites = [
        PlannedSite(name="stem", kind="standard", geometry="3->8 3x3", option=None, reason="it is the stem", macs=400),
        *(
            PlannedSite(name=name, kind="standard", geometry="8->8 3x3", option=option(*chosen), macs=COSTS[name],
                        parameters=90, seconds=COSTS[name] / 1e9, considered=considered(chosen, COSTS[name], COSTS[name] / 1e9))
            for name, chosen in (("body.0", CP), ("body.1", CHANNEL))
        ),
        PlannedSite(name="head", kind="pointwise", geometry="8->8 1x1", option=None, reason=EVIL, macs=800, seconds=8e-7),
    ]  # fmt: skip
    return Plan(
        tool_version="0.1.0", model=Fingerprint(geometry="g", weights="w"), rules=("balanced",), budget={"macs": 0.5}, seed=0,
        predicted=Predicted(effect=1e-3, macs=0.4, params=0.5, latency=0.6), sites=tuple(sites),
    )  # fmt: skip


def row(name: str, **changes: Any) -> SiteRow:
    macs = COSTS[name]
    values: dict[str, Any] = {
        "name": name, "kind": "standard", "geometry": "8->8 3x3", "action": "kept", "reason": "it is the stem",
        "parameters_before": 90, "parameters_after": 90, "macs_before": macs, "macs_after": macs,
    }  # fmt: skip
    return SiteRow(**(values | changes))


def reported(**changes: Any) -> Report:
    done = {"action": "rewritten", "reason": None, "parameters_after": 30, "error_basis": "held-out inputs"}
    sites = (
        row("stem"),
        row("body.0", **done, option="cp, rank 4", macs_after=3000, output_error=0.03, positions=500, unknowns=20),
        row("body.1", **done, option="channel, rank 2", macs_after=2000, output_error=0.015, positions=500, unknowns=9),
        row("head", kind="pointwise", reason=EVIL),
    )
    values: dict[str, Any] = {
        "tool_version": "0.1.0", "model": EVIL, "input_shapes": ((1, 3, 8, 8),), "rules": ("balanced",),
        "asked": Asked(budget={"macs": 0.5}), "reached": Reached(budget={"macs": 0.4}), "seed": 0, "threads": 1,
        "warnings": (f"few inputs at {EVIL}",), "commands": (f"convrewrite optimize {EVIL} -o out",),
        "calibration": CalibrationSummary(source=EVIL, kind="data", fitted_on=8, held_out=2), "sites": sites,
        "totals": Totals(
            parameters=Change(before=400, after=280), macs=Change(before=16_200, after=6_200),
            onnx_latency_seconds=LatencyChange(before=2e-5, after=1.2e-5, ratio=0.6, quartiles=(0.59, 0.61)),
            predicted_onnx_latency_seconds=1.1e-5,
        ),
        "fidelity": (OutputFidelityRow(name=EVIL, relative_error=0.02, top1_agreement=0.985, kl=0.0012),),
        "fidelity_examples": 2, "fidelity_basis": "measured on 2 held-out calibration inputs",
        "environment": Environment(python="3.11", torch="2.13", platform="Linux", cpu="a processor", cores=2),
        "notes": (EVIL,),
    }  # fmt: skip
    return Report(**(values | changes))


# --- without a browser


def test_blocks_are_as_wide_as_the_time_that_was_measured() -> None:
    view = view_of(reported(), planned())
    assert view.basis == "time"
    assert [site.before for site in view.sites] == [None, 9e-6, 6e-6, 8e-7]
    assert [site.after for site in view.sites] == [None, 4.5e-6, 3e-6, 8e-7]


@pytest.mark.parametrize(
    "plan", [None, planned().model_copy(update={"sites": planned().sites[:1]})], ids=["none", "untimed"]
)
def test_they_are_as_wide_as_the_macs_else(plan: Plan | None) -> None:
    view = view_of(reported(), plan)
    assert (view.basis, view.before, view.after) == ("MACs", 16_200, 6_200)


def test_every_option_that_lost_says_why() -> None:
    site = view_of(reported(), planned()).sites[1]
    taken, dearer, cheaper = (row.why for row in site.options)
    assert taken == "taken"
    assert dearer.startswith("1/10 of the harm, but 1.33x of the time")
    assert cheaper.startswith("cheaper (0.50x of the time), but 100 times the harm")
    assert (len(site.ruled_out), site.more) == (MOST_RULED_OUT, 3)
    assert all(row.why.startswith("no gain") for row in site.ruled_out)


def test_a_site_is_sorted_by_its_numbers_and_told_in_words() -> None:
    _, body, _, head = view_of(reported(), planned()).sites
    told = [2, "body.0", "standard", "8->8 3x3", "cp, rank 4", 90, 30, 9000, 3000, 1 / 3, 0.03, 25.0]
    assert [cell.value for cell in body.cells] == told
    assert [cell.value for cell in head.cells[5:]] == [90, 90, 800, 800, 1.0, -1.0, -1.0]
    facts = dict(body.facts)
    assert facts["MACs"] == "9.00 k to 3.00 k" and facts["parameters"] == "90 to 30"
    assert facts["time alone"] == "9.00 us to 4.50 us" and dict(head.facts)["time alone"] == "0.80 us"
    assert facts["error expected"] == "2 %" and facts["error measured"] == "3 % on held-out inputs"
    assert facts["fitted on"] == "500 positions for 20 unknowns"


def test_what_was_expected_stands_beside_what_was_measured() -> None:
    assert view_of(reported(), planned()).promises == (
        ("MACs left", "0.40x", "0.38x"), ("parameters left", "0.50x", "0.70x"), ("latency left", "0.60x", "0.60x"),
        ("ONNX latency", "11.0 us", "12.0 us"), ("effect on the output (KL, nats)", "0.001", "0.0012"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("costs", "effect", "why"),
    [
        ((100, 10, 1.1), 2e-3, "no better in anything: 1.10x of the time and 2.0 times the harm of the option taken"),
        (
            (90, 10, 1.1),
            2e-3,
            "cheaper (0.90x of the MACs), but 2.0 times the harm: that saving does less harm at other sites",
        ),
        ((110, 9, None), 2e-3, "cheaper (0.90x of the parameters), but 2.0 times the harm: that saving"),
        (
            (120, 10, 0.9),
            5e-4,
            "1/2.0 of the harm, but 1.20x of the MACs: the difference is better spent at other sites",
        ),
        ((90, 12, None), 5e-4, "1/2.0 of the harm, but 1.20x of the parameters: the difference"),
        (
            (90, 10, 0.9),
            5e-4,
            "1/2.0 of the harm alone and 0.90x of the time, but behind the option taken in the model as a",
        ),
        ((120, 10, 1.5), None, "1.50x of the time of the option taken"),
    ],
)
def test_what_is_said_of_an_option_is_true_of_time_macs_and_parameters(
    costs: tuple[int, int, float | None], effect: float | None, why: str
) -> None:
    known = {"error": 0.1, "reason": None}
    taken = Considered(option=option(*CP), macs=100, parameters=10, seconds=1.0, effect=1e-3, **known)  # type: ignore[arg-type]
    macs, parameters, seconds = costs
    entry = Considered(
        option=option(*CHANNEL), macs=macs, parameters=parameters, seconds=seconds, effect=effect, **known,  # type: ignore[arg-type]
    )  # fmt: skip
    assert _why(entry, planned().sites[1], taken).startswith(why)


def test_a_tile_leaves_nothing_out() -> None:
    latency = LatencyChange(before=2e-5, after=8e-8, ratio=0.004, quartiles=(0.004, 0.004))
    totals = reported().totals.model_copy(update={"onnx_latency_seconds": latency})
    shown = [tile.figure for tile in view_of(reported(totals=totals), planned()).tiles]
    assert shown == ["\N{MINUS SIGN}99.6 %", "\N{MINUS SIGN}30 %", "98.5 %"]


def test_the_page_of_an_earlier_result_needs_no_plan() -> None:
    folder = Path(__file__).parents[1] / "data" / "earlier" / "result"
    report = Report.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))
    plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"), "plan.json")
    for page in (render_html(report), render_html(report, plan)):
        assert page.count('<article class="site"') == len(report.sites) == 3


def analysis() -> Analysis:
    """Rows of a model that nothing was done to."""
    verdicts = {"balanced": "yes", "separable": EVIL}
    rows = [
        AnalysisRow(name=name, kind="standard", geometry="8->8 3x3", parameters=90, macs=macs, mac_share=macs / 16_200,
                    applies=verdicts if macs > 1000 else {"balanced": "too small", "separable": EVIL})
        for name, macs in COSTS.items()
    ]  # fmt: skip
    return Analysis(rows, EVIL, (EVIL,))


@pytest.mark.parametrize(
    "shown", [lambda: planned()._repr_html_(), lambda: analysis()._repr_html_(), lambda: render_summary(reported())]
)
def test_a_notebook_gets_pieces_that_run_nothing(shown: Callable[[], str]) -> None:
    piece = shown()
    assert "<script" not in piece and "<img" not in piece and "\x1b" not in piece
    assert "body.0" in piece


def test_a_page_takes_no_place_but_that_of_a_page(tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    analysis().save_page(place)
    analysis().save_page(place)
    assert place.read_text(encoding="utf-8") == render_analysis(EVIL, analysis(), (EVIL,))
    for mine in ("my notes", "<!DOCTYPE html><title>my page</title>", render_html(reported())):
        place.write_text(mine, encoding="utf-8")
        with pytest.raises(UsageError, match="holds something else than a page of an analysis"):
            analysis().save_page(place)
        assert place.read_text(encoding="utf-8") == mine


# --- in a browser


@dataclass
class Opened:
    """A page, and everything that it said or asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.json").write_text(reported().model_dump_json(), encoding="utf-8")
    (folder / "report.html").write_text(render_html(reported(), planned()), encoding="utf-8")
    return folder


def opened(chromium: Any, place: Path, width: int = 1400, scheme: str = "light") -> Opened:
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = Opened(page)
    page.on("console", lambda message: found.said.append(message.text))
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.on("request", lambda request: found.asked.append(request.url))
    page.on("dialog", lambda dialog: (found.said.append(dialog.message), dialog.dismiss()))
    page.goto(place.as_uri())
    return found


@pytest.fixture(scope="module")
def shown(chromium: Any, written: Path) -> Opened:
    return opened(chromium, written / "report.html")


def column(page: Any, index: int) -> list[str]:
    return page.locator(f"#table tbody tr:visible td:nth-child({index})").all_inner_texts()


def test_it_asks_for_nothing_and_says_nothing(shown: Opened, written: Path) -> None:
    assert shown.said == []
    assert shown.asked == [(written / "report.html").as_uri()]
    assert "owned" in shown.page.title() and "script" in shown.page.title(), "the name is text, and has not run"
    assert shown.page.locator("body img").count() == 0


def test_its_numbers_are_those_of_the_json(shown: Opened, written: Path) -> None:
    told = json.loads((written / "report.json").read_text(encoding="utf-8"))
    rows = shown.page.locator("#table tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.dataset.value))"
    )
    names = ("parameters_before", "parameters_after", "macs_before", "macs_after")
    found = [[cells[1], *map(int, cells[5:9])] for cells in rows]
    assert found == [[site["name"], *(site[name] for name in names)] for site in told["sites"]]
    errors = [float(cells[10]) for cells in rows]
    assert errors == [-1 if site["output_error"] is None else site["output_error"] for site in told["sites"]]
    figures = shown.page.locator(".tile .figure").all_inner_texts()
    assert figures == ["\N{MINUS SIGN}40 %", "\N{MINUS SIGN}30 %", "98.5 %"]
    widths = shown.page.locator("button.block").evaluate_all("all => all.map(b => b.getBoundingClientRect().width)")
    assert widths[1] / widths[2] == pytest.approx(9 / 6, rel=0.02)


def test_all_blocks_of_a_deep_network_are_in_a_narrow_page(chromium: Any, tmp_path: Path) -> None:
    deep = reported().model_copy(update={"sites": [row("stem")] * 180})
    (tmp_path / "deep.html").write_text(render_html(deep), encoding="utf-8")
    strips = opened(chromium, tmp_path / "deep.html", 400).page.locator(".blocks")
    assert strips.evaluate_all("all => all.map(s => s.scrollWidth - s.clientWidth)") == [0, 0]


def test_warnings_stand_before_everything_else(shown: Opened) -> None:
    assert shown.page.locator("main > *").first.get_attribute("class") == "warnings"


def test_a_click_opens_a_site(shown: Opened) -> None:
    page = shown.page
    page.locator("button.block").nth(2).click()
    assert page.locator("article.site:visible h3").all_inner_texts() == ["body.1"]
    assert page.locator("article.site:visible .chosen").inner_text().startswith("channel, rank 2")
    page.locator(".after .block").nth(1).click()
    assert page.locator("article.site:visible h3").all_inner_texts() == ["body.0"]
    page.locator("#table a").nth(3).click()
    page.locator("article.site:visible h3", has_text="head").wait_for()  # a link is followed a moment later
    assert page.locator("article.site:visible h3").all_inner_texts() == ["head"]


def test_the_keyboard_walks_through_the_network(shown: Opened) -> None:
    page = shown.page
    page.locator("button.block").nth(0).click()
    for key, name in (
        ("ArrowRight", "body.0"),
        ("ArrowRight", "body.1"),
        ("End", "head"),
        ("ArrowLeft", "body.1"),
        ("Home", "stem"),
    ):
        page.keyboard.press(key)
        assert page.locator("article.site:visible h3").all_inner_texts() == [name]
    assert page.locator("button.block[tabindex='0']").count() == 1


def test_the_table_sorts_by_numbers_and_by_names(shown: Opened) -> None:
    page = shown.page
    macs = page.locator("thead button", has_text="MACs").last
    macs.click()
    assert column(page, 2) == ["stem", "head", "body.1", "body.0"]
    macs.click()
    assert column(page, 2) == ["body.0", "body.1", "head", "stem"]
    assert page.locator("#table th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.locator("#table thead button", has_text="site").click()
    assert column(page, 2) == ["body.0", "body.1", "head", "stem"]
    page.locator("#table thead button").first.click()
    assert column(page, 1) == ["1", "2", "3", "4"]


def test_the_table_filters(shown: Opened) -> None:
    page = shown.page
    page.fill("#find", "BODY rank")
    assert column(page, 2) == ["body.0", "body.1"]
    assert page.inner_text("#count") == "2 of 4 sites"
    page.fill("#find", "")
    page.select_option("#action", "kept")
    page.select_option("#kind", "pointwise")
    assert column(page, 2) == ["head"]
    page.select_option("#action", "")
    page.select_option("#kind", "")
    assert len(column(page, 2)) == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_everyone_can_read_it(chromium: Any, written: Path, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = opened(chromium, written / "report.html", width, scheme)
    assert found.page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    faults = axe.Axe().run(found.page).response["violations"]
    serious = [
        (fault["id"], fault["nodes"][0]["html"]) for fault in faults if fault["impact"] in ("serious", "critical")
    ]
    assert serious == []
    found.page.close()


def test_the_page_of_an_untouched_model(chromium: Any, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = opened(chromium, analysis().save_page(tmp_path / "page.html"), 400, "dark")
    page = found.page
    page.locator("button.block").nth(2).click()
    assert page.locator("article.site:visible h3").all_inner_texts() == ["body.1"]
    page.locator("#table thead button", has_text="share").click()
    assert column(page, 2) == ["stem", "head", "body.1", "body.0"]
    page.fill("#find", "balanced")
    assert column(page, 2) == ["body.1", "body.0"]
    assert page.locator(".tile .figure").all_inner_texts() == ["16.2 k", "360", "92.6 %"]
    faults = axe.Axe().run(page).response["violations"]
    assert [fault["id"] for fault in faults if fault["impact"] in ("serious", "critical")] == []
    assert found.said == [] and len(found.asked) == 1
    page.close()
