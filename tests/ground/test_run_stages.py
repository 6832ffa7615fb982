"""How far a run is and how long it will take, by a clock that a test sets."""

import pytest

from convrewrite.run_stages import SHARES, RunStages, about, clock_text


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_stage_goes_on_at_its_pace(clock: Clock) -> None:
    stages = RunStages(("survey",), clock)
    assert (stages.line(), stages.seconds(), stages.left()) == ("", 0.0, None)
    stages.tell("survey", 0, 10, "conv1")
    clock.now += 4
    assert stages.begun["survey"].left(clock.now) is None, "no step is done"
    stages.tell("survey", 2, 10, "conv2")
    assert stages.left() == 16.0
    clock.now += 3
    stages.tell("survey", 2, 10, "conv2 again")
    assert stages.left() == 13.0, "it counts down between two steps"
    assert stages.line() == "[0:07] survey 2 of 10, about 0:13 left. conv2 again"
    clock.now += 30
    assert stages.left() == 0.0
    stages.tell("survey", 10, 10, "done")
    clock.now += 5
    assert stages.begun["survey"].seconds(clock.now) == 37.0
    assert stages.seconds() == 42.0


def test_what_is_to_come_takes_as_long_beside_as_on_the_example(clock: Clock) -> None:
    stages = RunStages(("survey", "fit", "verify"), clock)
    stages.tell("survey", 0, 4, "")
    clock.now += 10
    stages.tell("survey", 1, 4, "conv2: 5 options")
    ahead = 40 * (SHARES["fit"] + SHARES["verify"]) / SHARES["survey"]
    assert stages.left() == pytest.approx(30 + ahead)
    assert (
        stages.line()
        == "[0:10] survey 1 of 4, about 0:30 left; then fit, verify; about 0:35 left in all. conv2: 5 options"
    )
    stages.tell("fit", 0, 2, "conv1")
    assert stages.to_come == ["verify"] and stages.begun["survey"].ended == clock.now
    assert stages.line() == "[0:10] fit 0 of 2; then verify. conv1"
    stages.tell("verify", 0, 1, "export")
    assert stages.to_come == []


def test_a_stage_that_was_not_expected_and_one_that_does_not_come(clock: Clock) -> None:
    stages = RunStages(("survey", "latency", "fit", "refine", "verify"), clock)
    stages.tell("survey", 1, 1, "")
    stages.tell("swaps", 0, 2, "")
    assert stages.to_come == ["latency", "fit", "refine", "verify"]
    stages.tell("fit", 1, 1, "")
    assert stages.to_come == ["refine", "verify"]
    clock.now += 1
    stages.tell("other", 1, 1, "")
    assert stages.line().startswith("[0:01] other 1 of 1"), "all have ended, this one last"
    stages.tell("refine", 3, 1000, "")
    clock.now += 2
    stages.tell("verify", 0, 1, "")
    assert stages.begun["refine"].left(clock.now) == 0.0, "another one began: it ended early"
    assert stages.to_come == []


def test_a_stage_that_comes_again_adds_to_its_time(clock: Clock) -> None:
    stages = RunStages((), clock)
    for _ in range(3):
        stages.tell("fit", 0, 2, "")
        clock.now += 3
        stages.tell("fit", 1, 2, "")
        clock.now += 3
        stages.tell("fit", 2, 2, "")
        clock.now += 1
    assert stages.begun["fit"].seconds(clock.now) == 18.0
    assert stages.summary() == "[0:21] fit 0:18"


def test_an_outer_stage_tells_of_all_its_parts(clock: Clock) -> None:
    stages = RunStages(("survey", "points"), clock)
    stages.tell("survey", 1, 1, "")
    stages.tell("points", 0, 3, "macs=0.8")
    stages.tell("fit", 0, 5, "conv1")
    clock.now += 5
    assert stages.left() is None
    stages.tell("fit", 5, 5, "conv5")
    clock.now += 5
    stages.tell("points", 1, 3, "macs=0.5")
    stages.tell("fit", 0, 5, "conv1")
    clock.now += 2
    stages.tell("fit", 1, 5, "conv2")
    assert stages.left() == 18.0
    assert stages.line() == "[0:12] fit 1 of 5, about 0:08 left; about 0:18 left in all. conv2"
    stages.tell("fit", 5, 5, "conv5")
    stages.tell("points", 3, 3, "done")
    assert stages.begun["points"].ended == clock.now
    stages.tell("verify", 0, 2, "")
    clock.now += 4
    stages.tell("verify", 1, 2, "")
    assert stages.left() == 4.0, "one that has ended holds no other"


def test_times_as_text() -> None:
    assert [clock_text(seconds) for seconds in (0, 59.4, 59.6, 3599, 3725)] == [
        "0:00",
        "0:59",
        "1:00",
        "59:59",
        "1:02:05",
    ]
    found = [about(seconds) for seconds in (None, 0.2, 13.4, 44.0, 301.0, 7000.0)]
    assert found == [
        "",
        "about 0:01 left",
        "about 0:13 left",
        "about 0:45 left",
        "about 5:00 left",
        "about 1:56:30 left",
    ]
