"""Names and texts that would steer a terminal or forge a line, through every command and every page."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from commands import INPUT, call, small_network
from torch import Tensor, nn

import convrewrite
from convrewrite.cli.progress import progress_bars
from convrewrite.escaping import CAUSE_LENGTH, first_line, innermost_cause, one_line, summary
from convrewrite.places import out_of_memory
from convrewrite.reporting.html import render_html
from convrewrite.reporting.markdown import render_markdown
from convrewrite.reporting.text import render_text

INPUT_SHAPE = (1, 3, 16, 16)
EVIL = "\x1b]0;owned\x07\x1b[2Jname\u202e\r"
SHOWN = r"\x1b]0;owned\x07\x1b[2Jname\u202e\r"


def harmless(text: str) -> None:
    assert [c for c in text if not c.isprintable() and c != "\n"] == []


class Outputs(nn.Module):
    """Gives a dictionary with a key from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {EVIL: self.net(x)}


@pytest.fixture(scope="module")
def result() -> Any:
    return convrewrite.optimize(
        Outputs(), torch.zeros(INPUT_SHAPE), calibration="weights", measure=False, name=EVIL, notes=[EVIL, "a\nb"]
    )


def test_the_report_shows_them_and_its_json_has_them(result: Any, tmp_path: Path) -> None:
    assert result.report.model == EVIL
    page, web = render_markdown(result.report), render_html(result.report)
    harmless(page)
    harmless(web)
    assert SHOWN in web
    assert "\\\\x1b]0;owned\\\\x07\\\\x1b\\[2Jname" in page
    folder = result.save(tmp_path / "out")
    assert json.loads((folder / "report.json").read_text())["model"] == EVIL
    assert "name" in render_text(result.report)


def test_a_report_and_a_plan_with_them_on_the_command_line(result: Any, tmp_path: Path) -> None:
    plan = json.loads(result.save(tmp_path / "out").joinpath("plan.json").read_text())
    plan["sites"][0] |= {"name": EVIL, "reason": EVIL, "geometry": EVIL}
    path = tmp_path / f"plan{EVIL.strip()}.json"
    path.write_text(json.dumps(plan))
    for arguments in ((path,), (path, EVIL), (path, "nothing"), (tmp_path / EVIL,)):
        ran = call("explain", *arguments)
        harmless(ran.out + ran.err)
        assert SHOWN.rstrip("\\r") in ran.out + ran.err


@pytest.mark.parametrize("command", ["analyze", "optimize"])
def test_keys_and_classes_of_files(tmp_path: Path, command: str) -> None:
    more = ("-o", tmp_path / "out") if command == "optimize" else ()
    torch.save({EVIL: {EVIL: torch.ones(1)}, "b": 1}, tmp_path / "keys.pt")
    torch.save({EVIL: 1}, tmp_path / "nothing.pt")
    model = small_network()
    vars(model)[EVIL] = 1
    torch.save(model, tmp_path / "attribute.pt")
    model = small_network()
    model._modules[EVIL] = nn.ReLU()
    torch.save(model, tmp_path / "module.pt")
    for name in ("keys", "nothing", "attribute", "module"):
        ran = call(command, tmp_path / f"{name}.pt", *INPUT, *more)
        assert ran.code == 3
        harmless(ran.out + ran.err)


def test_outputs_of_an_onnx_file(tmp_path: Path) -> None:
    names = []
    for name in ("a.onnx", "b.onnx"):
        convrewrite.export(small_network(), torch.zeros(INPUT_SHAPE), tmp_path / name)
        model = onnx.load(str(tmp_path / name))
        old = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = [EVIL if output == old else output for output in node.output]
        model.graph.output[0].name = EVIL
        onnx.save(model, str(tmp_path / name))
        names.append(tmp_path / name)
    ran = call("verify", *names, *INPUT)
    assert ran.code == 0
    assert SHOWN.rstrip("\\r") in ran.out
    harmless(ran.out + ran.err)


def test_arguments_and_rules(tmp_path: Path) -> None:
    path, evil = tmp_path / "r.toml", json.dumps(EVIL)
    path.write_text(f"schema = 1\n[[rule]]\nname = {evil}\nstructures = [{evil}]\n{evil} = 1\n")
    rules, missing = ("rules", "check", path), ("analyze", EVIL)
    option, value = ("analyze", "x", f"--{EVIL}"), ("verify", "a", "b", "--expect", EVIL)
    for arguments in (rules, missing, option, value):
        ran = call(*arguments)
        assert ran.code != 0
        harmless(ran.out + ran.err)


def test_markup_in_a_progress_text_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        progress("fit", 0, 2, "[bold red]name[/] \x1b[2J [link=http://x]y[/link]")
    shown = capsys.readouterr().err
    assert "[bold red]name[/]" in shown
    assert "\x1b[2J" not in shown


def test_innermost_cause_is_one_short_line() -> None:
    try:
        try:
            raise ValueError("\x1b[96mfirst\x1b[0m line\n\n  second" + " more" * 100)
        except ValueError as inner:
            raise RuntimeError("outer") from inner
    except RuntimeError as error:
        text = innermost_cause(error)
    assert text.startswith("ValueError: first line second more")
    assert len(text) == CAUSE_LENGTH
    assert innermost_cause(KeyError()) == "KeyError"


class UnspeakableError(Exception):
    """An error of somebody else's that fails when it is asked for its text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_what_an_error_says_in_one_line() -> None:
    error = ValueError("\n first  line\nsecond")
    assert first_line(error) == "first  line"
    assert first_line(error, 5) == "first"
    assert one_line(error) == "first line second"
    assert one_line(error, 5) == "first"
    assert summary(error, 5) == "ValueError: first"
    for silent in (ValueError(), ValueError(" \n"), UnspeakableError()):
        name = type(silent).__name__
        assert first_line(silent) == one_line(silent) == summary(silent) == innermost_cause(silent) == name


def test_errors_that_were_raised_from_each_other_come_to_an_end() -> None:
    first, second = ValueError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert innermost_cause(first) == "RuntimeError: second"
    assert not out_of_memory(first)
    second.__cause__, second.args = None, ("CUDA error: out of memory",)
    assert out_of_memory(first)
