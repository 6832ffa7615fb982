"""The frontier of a model: its points are what the plans really give, and its folder lets each be made again."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clocks import FalseTimer
from networks import natural, settled
from torch import Tensor, nn

from convrewrite import Plan, Sweep, apply, optimize, pipeline, sweep
from convrewrite.cli import main
from convrewrite.errors import UsageError, VerificationError
from convrewrite.pipeline.keywords import Extras
from convrewrite.pipeline.networks import BoundNetwork
from convrewrite.pipeline.points import Frontier
from convrewrite.pipeline.run import Run
from convrewrite.reporting import SweepPoint, SweepReport, sweep_page
from convrewrite.reporting.charts import INKS
from convrewrite.reporting.sweep_report import with_knee
from convrewrite.results import Result
from convrewrite.rules.schema import Protect, Rule
from convrewrite.settings import Settings

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.5)
BUDGETS = (0.3, 0.75, 0.5, 0.01, 0.1 + 0.2)


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    return settled(Small())


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    torch.manual_seed(1)
    return natural(32, 3, 8, 8, torch.float32)


def parameters_of(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def found(model: Small, inputs: Tensor) -> Sweep:
    return sweep(
        model, inputs[:1], [RULE], inputs, BUDGETS, metric=parameters_of, measure=False, name="small</script><b>.pt"
    )


def test_every_budget_has_a_point_that_keeps_to_it_or_a_reason(found: Sweep, model: Small) -> None:
    (swept,) = found.report.models
    assert [point.budget for point in swept.points] == [0.75, 0.5, 0.3, 0.01]
    *reached, missed = swept.points
    assert missed.reason is not None and "cannot be met" in missed.reason and missed.plan is None
    for point in reached:
        assert point.macs is not None and point.macs <= point.budget and point.kl is not None
        assert point.parameters is not None and point.metric == round(point.parameters * swept.parameters)
    losses = [point.error for point in reached]
    assert losses == sorted(losses)  # less left, more lost
    assert swept.metric == swept.parameters == parameters_of(model)
    assert set(found.plans) == {point.plan for point in reached}


def test_a_result_that_fails_its_verification_ends_the_sweep(
    model: Small, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no point among others that a pipeline could overlook; the fits before it are kept for the next run."""

    def finish(_run: Run, *_rest: Any) -> Result:
        raise VerificationError("onnxruntime gives something else")

    monkeypatch.setattr(Run, "finish", finish)
    with pytest.raises(VerificationError, match="something else"):
        sweep(model, inputs[:1], [RULE], inputs, (0.75, 0.5), measure=False, fast=True)


def test_the_plan_of_a_point_gives_what_the_point_says(found: Sweep, model: Small, inputs: Tensor) -> None:
    point = found.report.models[0].points[1]
    result = apply(model, inputs[:1], found.plans[str(point.plan)], inputs, measure=False, refine=False)
    assert result.report.totals.macs.ratio == point.macs
    assert max(row.relative_error for row in result.report.fidelity) == point.error


def test_a_point_says_what_its_result_does(model: Small, inputs: Tensor) -> None:
    timer = FalseTimer(1.3)
    result = optimize(model, inputs[:1], [RULE], inputs, timer=timer, fast=True)
    run: Any = SimpleNamespace(choose=lambda: None, finish=lambda *_given: result)
    network = BoundNetwork(model, (inputs[:1],), "small")
    frontier = Frontier(network, (), inputs, Settings(budget={"macs": 0.5}), Extras(), (0.5,), parameters_of)
    made, totals = frontier._point(run, 0.5), result.report.totals
    assert totals.onnx_latency_seconds is not None
    [output] = result.report.fidelity
    assert (made.seconds, made.basis, made.plan) == (1.0, result.report.fidelity_basis, result.plan.to_json())
    assert made.point.model_dump(exclude={"command", "plan", "knee", "beaten"}) == {
        "budget": 0.5, "macs": totals.macs.ratio, "parameters": totals.parameters.ratio, "latency": 1.3,
        "agreement": output.top1_agreement, "kl": output.kl, "error": output.relative_error,
        "metric": parameters_of(result.model), "refused": result.report.refused, "reason": None,
    }  # fmt: skip
    assert "slower" in str(made.point.refused)


def test_the_survey_is_made_once(model: Small, inputs: Tensor) -> None:
    seen: list[tuple[str, int]] = []
    sweep(
        model, inputs[:1], [RULE], inputs, (0.7, 0.5, 0.3), measure=False, fast=True,
        progress=lambda stage, done, _total, _text: seen.append((stage, done)),
    )  # fmt: skip
    assert seen.count(("survey", 0)) == 1 and seen.count(("points", 1)) == 1 and seen.count(("points", 3)) == 1


def test_the_folder_holds_plans_points_and_a_page_and_commands_that_fit(
    found: Sweep, model: Small, inputs: Tensor, tmp_path: Path
) -> None:
    other = Sweep(found.report, found.plans)
    place = found.joined(other).save(tmp_path / "sweep", ["--calib", "my images"])
    assert sorted(path.name for path in place.iterdir()) == ["page.html", "plans", "sweep.json"]
    report = SweepReport.model_validate_json((place / "sweep.json").read_text())
    assert len(report.models) == 2
    for point in report.models[0].points[:3]:
        file = place / "plans" / str(point.plan)
        assert Plan.from_json(file.read_text(), "") == found.plans[str(point.plan)]
        assert f" apply 'small</script><b>.pt' {file} " in str(point.command)
        assert "--calib 'my images' --no-refine" in str(point.command)
    found.save(place)  # an earlier sweep is replaced
    (place / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        found.save(place)


def test_the_page_stands_alone_and_holds_the_data(found: Sweep) -> None:
    page = sweep_page(found.report)
    data = page.partition('id="sweep">')[2].partition("</script>")[0]
    assert SweepReport.model_validate(json.loads(data)) == found.report
    assert "<b>" not in page and re.search(r"(src|href)=.?http|url\(http|@import", page) is None
    assert page.count("<tr") == 5 and page == sweep_page(found.report)
    assert all(colour not in page for colour in INKS)  # which are those of the page's scheme, light or dark
    assert "<script>" not in page and "default-src 'none'" in page


def titles(report: SweepReport) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", sweep_page(report))


def test_the_page_draws_every_measure_against_every_cost_the_one_of_budgets_first(found: Sweep) -> None:
    report = found.report
    measures = [m for m in ("Agreement", "KL", "Error", "parameters_of") if m != "Error" or not scored(report)]
    expected = [f"{measure} against {cost}" for cost in ("MACs", "parameters") for measure in measures]
    assert titles(report) == expected
    (swept,) = report.models
    unscored = [p.model_copy(update={"agreement": None, "kl": None, "metric": None}) for p in swept.points]
    odd = swept.model_copy(update={"name": "_$x^$<i>", "points": tuple(unscored)})
    joined = report.model_copy(update={"resource": "params", "metric": None, "models": (odd, odd)})
    assert titles(joined) == ["Error against parameters", "Error against MACs"]
    assert "<i>" not in sweep_page(joined) and "$x^$" in sweep_page(joined)
    empty = odd.model_copy(update={"points": (SweepPoint(budget=0.1, reason="cannot be met"),)})
    nothing = report.model_copy(update={"models": (empty,), "metric": None})
    assert titles(nothing) == [] and "cannot be met" in sweep_page(nothing)


def test_the_text_says_why_a_point_is_no_success(found: Sweep) -> None:
    (swept,) = found.report.models
    refused = [p.model_copy(update={"refused": None if p.reason else "it is slower"}) for p in swept.points]
    report = found.report.model_copy(update={"models": (swept.model_copy(update={"points": tuple(refused)}),)})
    assert "macs=0.5: no success: it is slower" in report.text()
    assert report.text().count("no success: ") == 3 and report.text().count("cannot be met") == 1


def scored(report: SweepReport) -> bool:
    return all(p.agreement is not None for model in report.models for p in model.points if p.reason is None)


def test_the_page_marks_the_knee_in_its_table_and_its_curves(found: Sweep) -> None:
    (swept,) = found.report.models
    bent = with_knee(points((0.9, 0.0), (0.6, 0.02), (0.4, 0.05), (0.2, 0.6), (0.1, 1.0)), "macs")
    report = found.report.model_copy(update={"models": (swept.model_copy(update={"points": bent}),)})
    page = sweep_page(report)
    assert page.count('<tr class="knee"><td>knee</td><td>0.4</td>') == 1 and page.count(">knee</text>") == 1


def points(*pairs: tuple[float, float]) -> list[SweepPoint]:
    return [SweepPoint(budget=cost, macs=cost, error=loss) for cost, loss in pairs]


def test_the_knee_is_where_the_curve_bends() -> None:
    bent = with_knee(points((0.9, 0.0), (0.6, 0.02), (0.4, 0.05), (0.2, 0.6), (0.1, 1.0)), "macs")
    assert [point.budget for point in bent if point.knee] == [0.4]
    for straight in (points((0.9, 0.0), (0.1, 1.0)), points((0.9, 0.1), (0.5, 0.1), (0.1, 0.1)), []):
        assert not any(point.knee for point in with_knee(straight, "macs"))


def test_where_all_classes_agree_the_knee_is_that_of_the_kl() -> None:
    agreeing = [
        SweepPoint(budget=cost, macs=cost, agreement=1.0, kl=kl, error=0.1)
        for cost, kl in ((0.9, 0.0), (0.6, 0.02), (0.4, 0.05), (0.2, 0.6), (0.1, 1.0))
    ]
    assert [point.budget for point in with_knee(agreeing, "macs") if point.knee] == [0.4]


def test_no_tick_says_more_than_all(found: Sweep) -> None:
    points = tuple(p.model_copy(update={"agreement": 1.0, "kl": 0.0}) for p in found.report.models[0].points)
    report = found.report.model_copy(update={"models": (found.report.models[0].model_copy(update={"points": points}),)})
    drawing = sweep_page(report).partition("Agreement against")[2].partition("</svg>")[0]
    ticks = [float(part) for part in re.findall(r">(\d[\d.]*) %<", drawing)]
    assert 100 in ticks and max(ticks) == 100


def test_a_point_that_another_beats_is_no_part_of_the_frontier(found: Sweep) -> None:
    curve = points((0.9, 0.03), (0.6, 0.02), (0.4, 0.05), (0.3, 0.04), (0.2, 0.6), (0.1, 1.0))
    swept = found.report.models[0].model_copy(update={"points": tuple(curve)}).marked("macs")
    assert [point.budget for point in swept.points if point.beaten] == [0.9, 0.4]
    assert [point.budget for point in swept.points if point.knee] == [0.3]
    front = [point.error for point in swept.points if not point.beaten]
    assert front == sorted(front)
    page = sweep_page(found.report.model_copy(update={"models": (swept,)}))
    assert page.count("<td>beaten</td>") == 2


@pytest.mark.parametrize("budgets", [(), (1.0,), (0.5, -0.1), 0.5, "half", ("half",), None])
def test_budgets_are_parts(model: Small, inputs: Tensor, budgets: Any) -> None:
    with pytest.raises(UsageError, match=r"^budgets: expected parts in .*, found "):
        sweep(model, inputs[:1], [RULE], inputs, budgets, measure=False)


def test_a_metric_is_a_function(model: Small, inputs: Tensor) -> None:
    with pytest.raises(
        UsageError, match=r"^metric: expected a function from a model to a number, found 'top1'; give one"
    ):
        sweep(model, inputs[:1], [RULE], inputs, metric="top1", measure=False)  # type: ignore[arg-type]


RULES = """schema = 1
[[rule]]
name = "r"
structures = ["channel"]
ratio = 0.5
protect = { stem = false, min_channels = 0, min_mac_share = 0.0 }
"""


def test_the_command_sweeps_models_side_by_side(
    model: Small, inputs: Tensor, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(*model), "a.pt")
    torch.save(nn.Sequential(*list(model)[:6]), "b.pt")
    torch.save(inputs, "inputs.pt")
    Path("r.toml").write_text(RULES)
    Path("mine.py").write_text("def size(model): return sum(p.numel() for p in model.parameters())\n")
    words = ["sweep", "a.pt", "b.pt", "--rule", "r.toml", "--budgets", "0.7..0.4:2", "--calib", "inputs.pt", "--metric"]
    assert main([*words, "mine.py:size", "--no-onnx", "--fast", "-o", "out"]) == 0
    assert "a.pt" in capsys.readouterr().out
    report = SweepReport.model_validate_json(Path("out/sweep.json").read_text())
    assert [swept.name for swept in report.models] == ["a.pt", "b.pt"]
    assert report.metric == "size" and report.models[1].points[0].agreement is None
    command = str(report.models[0].points[0].command).split()
    assert main(command[1:]) in (0, 1)  # the command that makes a point makes it
    made = json.loads(Path("a-0.7/report.json").read_text())
    assert made["totals"]["macs"]["after"] / made["totals"]["macs"]["before"] == report.models[0].points[0].macs
    assert main([*words, "mine.py:nothing", "-o", "out"]) == 3
    assert main(["sweep", "a.pt", "--budgets", "0.8..x", "-o", "out"]) == 2
    assert main(["sweep", "a.pt", "--resource", "money", "-o", "out"]) == 2
    monkeypatch.setattr(pipeline, "sweep_all", lambda *_: pytest.fail("the work began before all models were opened"))
    assert main(["sweep", "a.pt", "gone.pt", *words[3:-1], "-o", "out"]) == 3


def swept(model: Small, inputs: Tensor, metric: Any) -> Any:
    return sweep(model, inputs[:1], [RULE], inputs, (0.75,), metric=metric, measure=False, fast=True).report.models[0]


def test_a_metric_that_raises_or_gives_no_number_is_told_of(model: Small, inputs: Tensor) -> None:
    calls: list[int] = []

    def second(_model: nn.Module) -> float:
        calls.append(1)
        return 1.0 / (2 - len(calls))

    with pytest.raises(
        UsageError, match=r"metric second: calling it with the model of macs=0\.75 raised ZeroDivisionErr"
    ):
        swept(model, inputs, second)
    for made in ("good", None, (1, 2), torch.zeros(2), 10**400, 1j):
        with pytest.raises(UsageError, match=r"metric <lambda>: expected a number of the original, found "):
            swept(model, inputs, lambda _model, made=made: made)


@pytest.mark.parametrize("made", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_left_empty(made: float, model: Small, inputs: Tensor) -> None:
    found = swept(model, inputs, lambda _model: made)
    assert found.metric is None and found.points[0].metric is None and found.points[0].error is not None


def test_what_a_metric_does_to_its_model_changes_nothing_else(model: Small, inputs: Tensor) -> None:
    def spoil(model: nn.Module) -> float:
        for parameter in model.parameters():
            parameter.data.zero_()
        return 1.0

    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, plain = swept(model, inputs, spoil), swept(model, inputs, None)
    assert [(p.error, p.agreement) for p in found.points] == [(p.error, p.agreement) for p in plain.points]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
