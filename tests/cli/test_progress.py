"""Progress where there is no terminal, in one of 80 columns, and in a notebook."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from convrewrite.cli import progress, progress_bars
from convrewrite.cli.bars import Bars
from convrewrite.cli.progress import SECONDS_BETWEEN_LINES, _Lines, stages_of
from convrewrite.process import quiet
from convrewrite.run_stages import RunStages
from convrewrite.settings import Settings

ROOT = Path(__file__).parents[2]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    stages = RunStages(("survey", "fit"), clock)
    lines = _Lines(stages, clock)
    for step in range(1, 101):
        clock.now += 0.5
        stages.tell("survey", step, 200, f"conv{step}")
        lines.change()
    lines.end()
    shown = capsys.readouterr()
    assert shown.out == ""
    said = shown.err.splitlines()
    assert len(said) == 50 / SECONDS_BETWEEN_LINES + 1
    assert said[4] == "[0:20] survey 41 of 200, about 1:20 left; then fit; about 1:35 left in all. con…"
    assert said[-1] == "[0:50] survey 0:50"
    assert not set(map(ord, shown.err)) & {*range(10), *range(11, 32), 127}, "control characters"


def test_names_from_elsewhere_do_nothing_to_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars("fit") as tell:
        tell("fit", 0, 2, "conv\x1b[2J\nconvrewrite: forged")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("[0:00] fit 0 of 2. conv") and "\x1b" not in first
    assert last == "[0:00] fit 0:00"


def test_a_terminal_of_80_columns_shows_every_stage_and_all_of_it() -> None:
    clock, out = Clock(), io.StringIO()
    stages = RunStages(("prepare", "survey", "fit", "verify"), clock)
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    stages.tell("prepare", 1, 1, "done")
    bars = Bars(stages, console)
    bars.change()
    clock.now += 30
    stages.tell("survey", 0, 20, "stage1.0.conv1")
    clock.now += 20
    stages.tell("survey", 10, 20, "stage2.0.conv1: [bold]21[/] options of a long name that has no room")
    bars.change()
    table = console.render_lines(bars._bars.get_renderable())
    bars.end()
    prepared, survey, whole = ("".join(part.text for part in line).rstrip() for line in table)
    assert prepared.startswith("prepare") and "1/1" in prepared
    assert " 10/20 0:20, about 0:20 left stage2.0.conv1: [bold" in survey and survey.endswith("…")
    assert max(len(prepared), len(survey), len(whole)) <= 80
    assert whole == "all: 0:50, about 0:25 left, then fit, verify"


def test_a_notebook_has_one_text_that_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def display(data: dict[str, str], **how: Any) -> Any:
        assert how == {"raw": True, "display_id": True}
        shown.append(data["text/plain"])
        return SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))

    monkeypatch.setattr(progress, "_notebook", lambda: display)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_CHANGES", 0.0)
    with progress_bars("fit") as tell:
        tell("fit", 0, 2, "conv1")
        tell("fit", 1, 2, "conv2")
    assert len(shown) == 3 and shown[0] == "[0:00] fit 0 of 2. conv1" and shown[-1] == "[0:00] fit 0:00"
    assert capsys.readouterr() == ("", "")


def test_what_a_run_will_do_is_known_from_what_is_asked() -> None:
    budget = Settings(budget={"macs": 0.5})
    assert stages_of(budget, "images", "optimize") == ("prepare", "survey", "fit", "verify")
    assert stages_of(Settings(), "images", "optimize") == ("prepare", "fit", "refine", "verify")
    assert "refine" in stages_of(Settings(budget={"macs": 0.5}, refine=True), "images", "optimize")
    assert stages_of(budget, "images", "plan") == ("prepare", "survey")
    assert stages_of(Settings(), None, "optimize") == ("prepare", "synthesise inputs", "fit", "verify")
    assert stages_of(Settings(fast=True, measure=False), "images", "apply") == ("prepare", "fit")
    assert stages_of(Settings(budget={"latency": 0.5}, refine=False), "weights", "optimize")[1:3] == (
        "survey",
        "latency",
    )
    assert stages_of(Settings(), "images", "plan", several=True) == ("prepare", "fit")
    assert stages_of(Settings(), "images", "sweep") == ("prepare", "survey", "points")


def test_lines_of_a_log_keep_to_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars("fit", *(f"a stage of number {number}" for number in range(9))) as tell:
        tell("fit", 0, 2, "conv1")
    first, last = capsys.readouterr().err.splitlines()
    assert len(first) == 80 and first.endswith("…") and last == "[0:00] fit 0:00"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_drawn_over_themselves_while_a_thread_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is while a model is exported: what stands in place of the stream then writes a line for every frame."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    view = progress._view(RunStages(("fit",), Clock()))
    assert isinstance(view, Bars)
    with quiet():
        assert view._bars.console.file is terminal
    view.end()


def test_a_command_in_a_terminal_draws_and_leaves_whole_lines() -> None:
    """In a pseudo-terminal of its own: the bars are drawn, the report is not on the same stream."""
    program = (
        "import logging\n"
        "from convrewrite.cli import progress_bars\n"
        "from convrewrite.cli.voice import speaking\n"
        "with speaking(False, 1), progress_bars('fit', 'verify') as tell:\n"
        "    for step in range(4):\n"
        "        tell('fit', step, 3, f'conv{step}')\n"
        "        logging.getLogger('convrewrite.fitting').info('what was decided %d', step)\n"
        "print('the report')\n"
    )
    main, other = pty.openpty()
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=surroundings, stderr=other, stdout=subprocess.PIPE, check=True
    )
    os.close(other)
    drawn = os.read(main, 1 << 16).decode()
    os.close(main)
    assert ran.stdout == b"the report\n"
    said = [line.rstrip() for line in re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", drawn).splitlines()]
    logged = [line for line in said if "what was decided" in line]
    assert [line[-19:] for line in logged] == [f" what was decided {step}" for step in range(4)]
    assert all(line.startswith("[") for line in logged), "bars are drawn below what is logged"
    assert "3/3" in drawn and "then verify" in drawn and drawn.rstrip("\x1b[?25h").endswith("\n")
