"""Drawings of pages."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convrewrite.reporting.charts import ErrorPoint, agreement_chart, depth_chart, recovery_chart
from convrewrite.reporting.report import RecoveredSummary


def test_matplotlib_is_imported_as_something_is_drawn_and_does_not_say_where_its_fonts_are_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a folder that cannot be made, whoever runs this
    program = (
        "import sys, convrewrite.pipeline, convrewrite.reporting.charts as charts; assert 'matplotlib' not in sys.modules; "
        "assert charts.depth_chart([charts.ErrorPoint(1, None, 0.1)]).startswith('<svg')"
    )
    nowhere = {name: str(tmp_path / "file") for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")}
    ran = subprocess.run([sys.executable, "-c", program], env=os.environ | nowhere, capture_output=True, check=False)
    assert ran.returncode == 0 and ran.stderr == b"", ran.stderr


@pytest.mark.parametrize("effects", [(0.0123, 0.01225), (0.5, 0.004, 1e-05), (0.001, 0.001)])
def test_ticks_of_a_recovery_are_different_numbers_and_steps_whole(effects: tuple[float, ...]) -> None:
    last = len(effects) - 1
    drawn = recovery_chart(
        RecoveredSummary(
            before=effects[0], after=effects[-1], steps=last, kept_step=last, minutes=1, trained_on=8, held_out=2,
            curve=tuple(enumerate(effects)),
        )
    )  # fmt: skip
    steps, effect = (
        re.findall(r"<text[^>]*>([^<]+)</text>", axis) for axis in re.split(r'<g id="matplotlib.axis_', drawn)[1:]
    )
    assert steps.pop() == "steps" and steps == [str(int(step)) for step in steps]
    assert effect[0] != effect[1] and len(effect) == len(set(effect)) > 2, effect
    ticks = [float(text) for text in effect if text[0].isdigit()]
    assert ticks == sorted(ticks) and ticks[0] <= effects[-1] * 1.1 and ticks[-1] >= effects[0] / 2


def test_numbers_that_are_none_are_not_drawn() -> None:
    sound = ErrorPoint(3, 0.1, 0.2)
    beside = [ErrorPoint(place, alone, 0.1) for place, alone in enumerate((math.inf, math.nan), 1)]
    assert agreement_chart(beside) == ""
    assert agreement_chart([*beside, sound]) == agreement_chart([sound]) != ""
    came = RecoveredSummary(
        before=math.inf,
        after=0.1,
        steps=5,
        kept_step=5,
        minutes=1,
        trained_on=8,
        held_out=2,
        curve=((0, math.inf), (5, 0.1)),
    )
    drawn = recovery_chart(came)
    assert "kept" in drawn and "what came in" not in drawn


def test_a_users_style_is_not_that_of_a_page() -> None:
    """A ``matplotlibrc``, of the user or in the working folder, may ask for LaTeX, which is not everywhere, and runs its text."""
    import matplotlib

    points = [ErrorPoint(1, 0.1, 0.2), ErrorPoint(2, 0.2, 0.3)]
    usual = depth_chart(points)
    with matplotlib.rc_context({"text.usetex": True, "text.latex.preamble": "\\undefined", "axes.facecolor": "black"}):
        assert depth_chart(points) == usual
        assert matplotlib.rcParams["text.usetex"]
