"""Which points of a sweep others beat, and which is the knee, by hand."""

import html

import pytest

from convrewrite.reporting.sweep_report import SweepPoint, SweepReport, SweptModel, sweep_rows, with_beaten, with_knee


def point(budget: float, **measured: float | str | None) -> SweepPoint:
    return SweepPoint.model_validate({"budget": budget, "macs": budget, **measured})


def beaten(*points: SweepPoint, resource: str = "macs") -> list[float]:
    return [found.budget for found in with_beaten(points, resource) if found.beaten]


def test_what_costs_no_more_and_loses_less_beats() -> None:
    assert beaten(point(0.9, kl=0.1), point(0.5, kl=0.2)) == []
    assert beaten(point(0.9, kl=0.3), point(0.5, kl=0.2)) == [0.9]
    assert beaten(point(0.9, kl=0.2), point(0.5, kl=0.2)) == [], "it loses as much"
    assert beaten(point(0.9, kl=0.3, macs=0.5), point(0.5, kl=0.2)) == [0.9], "it costs as much"
    assert beaten(point(0.9, agreement=0.8), point(0.5, agreement=0.9)) == [0.9]
    assert beaten(point(0.9, error=0.3, kl=None), point(0.5, error=0.2)) == [0.9]
    assert beaten(point(0.9, kl=0.1, agreement=0.1), point(0.5, kl=0.2, agreement=0.9)) == [], "the KL comes first"


def test_what_has_no_plan_or_was_not_timed_neither_beats_nor_is_beaten() -> None:
    none = SweepPoint(budget=0.1, reason="it cannot be reached")
    assert beaten(point(0.9, kl=0.3), none) == []
    timed, untimed = point(0.9, kl=0.3, latency=0.8), point(0.5, kl=0.2)
    assert beaten(timed, untimed, resource="latency") == []
    assert beaten(timed, untimed.model_copy(update={"latency": 0.7}), resource="latency") == [0.9]
    assert beaten(timed, untimed.model_copy(update={"parameters": 0.7}), resource="params") == []


def test_a_result_whose_kl_is_no_number_loses_most() -> None:
    """It agrees in some classes all the same, and one minus that is no KL."""
    broken = point(0.5, agreement=0.4)
    assert beaten(point(0.9, kl=2.0, agreement=0.5), broken) == []
    assert beaten(broken, point(0.3, kl=2.0, agreement=0.5)) == [0.5]
    assert beaten(point(0.9, agreement=None), point(0.5, error=0.9)) == [0.9], "its error is no number"
    curve = [point(0.9, kl=0.0), point(0.6, kl=0.02), point(0.4, kl=0.05), point(0.2, kl=0.6), point(0.1, kl=1.0)]
    worst = point(0.05, agreement=0.9)
    knees = [found.budget for found in with_knee(with_beaten((*curve, worst), "macs"), "macs") if found.knee]
    assert knees == [0.4]


def test_a_point_that_is_beaten_is_no_knee() -> None:
    curve = (point(0.9, kl=0.0), point(0.6, kl=0.02), point(0.4, kl=0.05), point(0.2, kl=1.0), point(0.3, kl=0.049))
    found = SweptModel(name="net", macs=10, parameters=10, points=curve).marked("macs")
    assert [p.budget for p in found.points if p.beaten] == [0.4]
    assert [p.budget for p in found.points if p.knee] == [0.3]
    assert [row[:2] for row in sweep_rows(found)] == [
        ("", "0.9"), ("", "0.6"), ("beaten", "0.4"), ("", "0.2"), ("knee", "0.3"),
    ]  # fmt: skip


def test_a_notebook_says_as_the_terminal_does_what_is_wrong_with_points() -> None:
    points = (point(0.9, refused="it is <slower>"), SweepPoint(budget=0.1, reason="it cannot be reached"))
    model = SweptModel(name="net", macs=10, parameters=10, points=points)
    report = SweepReport(tool_version="1", resource="macs", rules=(), basis="measured", models=(model,))
    for shown in (report.text(), html.unescape(report._repr_html_())):
        assert "macs=0.9: no success: it is <slower>" in shown and "macs=0.1: it cannot be reached" in shown


def test_the_knee_is_looked_for_between_the_ends_wherever_these_are() -> None:
    curve = [point(macs, kl=kl) for macs, kl in ((0.9, 2.1), (0.7, 2.2), (0.5, 3.1))]
    assert [found.knee for found in with_knee(curve, "macs")] == [False, True, False]


def test_the_loss_of_a_point_is_the_finest_of_its_measures() -> None:
    assert point(0.9, kl=0.2, agreement=0.75, error=0.5).loss == 0.2
    assert point(0.9, agreement=0.75, error=0.5).loss == 0.25
    assert point(0.9, error=0.5).loss == 0.5
    assert SweepPoint(budget=0.1, reason="it cannot be reached").loss is None


@pytest.mark.parametrize(
    "curve",
    [
        [(0.9, 0.0), (0.1, 1.0)],  # of two points neither is between
        [(0.9, 0.0), (0.5, 0.5), (0.1, 1.0)],  # straight
        [(0.9, 0.0), (0.5, 0.8), (0.1, 1.0)],  # bent the other way
        [(0.5, 0.1), (0.5, 0.1), (0.5, 0.1)],
        [(0.9, 0.1), (0.5, 0.1), (0.1, 0.1)],
    ],
)
def test_where_there_is_no_knee(curve: list[tuple[float, float]]) -> None:
    assert not any(found.knee for found in with_knee([point(macs, kl=kl) for macs, kl in curve], "macs"))
