"""What a command says: nothing but errors with --quiet, what the library logs with -v, before its name and behind it."""

import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commands import INPUT, call, small_network
from pydantic import RootModel

from convrewrite.cli.commands import app
from convrewrite.cli.grouped import _all
from convrewrite.cli.voice import LIBRARY, is_quiet, say, say_json, say_json_text, speaking, width
from convrewrite.errors import UsageError

ROOT: Any = typer.main.get_command(app)
COMMANDS = dict(_all(ROOT, ()))
LINE = re.compile(r"\[ *\d+\.\d s\] [a-z_.]+: .+")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voice")
    torch.save(small_network(), folder / "net.pt")
    return folder


def test_silence_leaves_a_result_and_says_nothing(place: Path) -> None:
    words = ("optimize", place / "net.pt", *INPUT, "--no-onnx", "--calib", "weights", "-o")
    for ran in (call("-q", *words, place / "a"), call(*words, place / "a", "--quiet")):
        assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert (place / "a" / "report.json").is_file()
    told = call(*words, place / "b", "--json", "-q")
    assert json.loads(told.out)["model"].endswith("net.pt")
    assert told.err == ""


def test_silence_changes_no_exit_code_and_hides_no_error(place: Path) -> None:
    failed = call("verify", place / "net.pt", place / "net.pt", *INPUT, "--agreement", "0.5", "-q")
    assert (failed.code, failed.out, failed.err) == (0, "", "")
    torch.save(small_network(seed=5), place / "other.pt")
    loud, silent = (
        call(*flags, "verify", place / "net.pt", place / "other.pt", *INPUT, "--expect", "parity")
        for flags in ((), ("-q",))
    )
    assert (silent.code, silent.out, silent.message) == (loud.code, "", loud.message) and loud.code == 1
    assert call("-q", "analyze", place / "nothing.pt").code == 3


def test_what_is_decided_is_said_on_the_error_stream(place: Path) -> None:
    words = ("optimize", place / "net.pt", *INPUT, "--no-onnx", "--calib", "weights", "--no-resume", "-o", place / "c")
    plain, before, behind, more = (call(*words), call("-v", *words), call(*words, "-v"), call("-v", *words, "-vv"))
    for ran in (before, behind, more):
        assert ran.code == 0
        assert "Written to" in ran.said and not any(map(LINE.fullmatch, ran.out.splitlines()))
    lines = [[line for line in ran.err.splitlines() if LINE.fullmatch(line)] for ran in (plain, before, behind, more)]
    assert [len(found) for found in lines[:1]] == [0]
    assert len(lines[1]) == len(lines[2]) < len(lines[3])
    for text in (
        "4 convolution sites, 2 of which the rules take",
        "asked for: each rule's own ratio",
        "seconds of stages: ",
    ):
        assert sum(text in line for line in lines[1]) == 1
    assert any("3: separable, error" in line for line in lines[1])
    assert any("0: it is the stem" in line for line in lines[3])


@pytest.mark.parametrize(
    "words", [("-q", "rules", "list", "-v"), ("rules", "list", "-qv"), ("-vv", "rules", "list", "--quiet")]
)
def test_silence_and_words_together_are_refused(words: tuple[str, ...]) -> None:
    ran = call(*words)
    assert ran.code == 2
    assert ran.message == "--quiet, --verbose: expected one of them, found both; leave one out"


def test_a_command_leaves_no_logger_changed(place: Path) -> None:
    logger = logging.getLogger(LIBRARY)
    before = logger.level, list(logger.handlers)
    assert call("-v", "analyze", place / "net.pt", *INPUT, "-vv").code == 0
    assert call("-vv", "analyze", place / "nothing.pt").code == 3
    assert (logger.level, list(logger.handlers)) == before
    assert not is_quiet()
    with pytest.raises(UsageError), speaking(True, 1):
        pytest.fail("both were taken")
    with speaking(True, 0), speaking(False, 0):
        assert is_quiet()
    assert not is_quiet()


def test_a_line_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with speaking(False, 1):
        logging.getLogger(f"{LIBRARY}.graph").info("a %s of a layer", "\x1b[31mname\nconvrewrite: forged")
        logging.getLogger(f"{LIBRARY}.graph").debug("not asked for")
        logging.getLogger("other").info("not ours")
        say("text")
    said = capsys.readouterr()
    assert said.out == "text\n"
    [line] = said.err.splitlines()
    assert LINE.fullmatch(line)
    assert "\x1b" not in line and line.endswith("name convrewrite: forged of a layer")


@pytest.mark.parametrize(
    ("encoding", "name"), [("latin-1", "caf\xe9\\u73ed"), ("ascii", r"caf\xe9\u73ed"), ("utf-8", "café班")]
)
def test_what_an_encoding_lacks_is_written_out(monkeypatch: pytest.MonkeyPatch, encoding: str, name: str) -> None:
    bytes_ = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, encoding=encoding, write_through=True))
    say("café班")
    assert bytes_.getvalue().decode(encoding) == f"{name}\n"
    bytes_.truncate(0)
    bytes_.seek(0)
    say_json(RootModel("café班😀"))
    assert json.loads(bytes_.getvalue().decode()) == "café班😀", "JSON is read as UTF-8"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_silent_or_say_more(name: str) -> None:
    words = {word for parameter in COMMANDS[name].params for word in parameter.opts}
    assert {"-q", "--quiet", "-v", "--verbose"} <= words


@pytest.mark.parametrize(("is_terminal", "columns", "expected"), [(True, 120, 120), (True, 60, 80), (False, 120, 80)])
def test_only_a_wide_terminal_gets_more_than_80_columns(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, columns: int, expected: int
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert width() == expected


def test_names_in_json_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON itself writes out no character above U+001F: U+009B begins a sequence of a terminal, as escape and bracket do."""
    name = "caf\xe9 \x1b[2J \x9b2J \x7f \u202e \U000e0041"
    say_json_text(json.dumps({"name": name}, ensure_ascii=False, indent=1))
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines()) and "caf\xe9" in printed
    assert json.loads(printed) == {"name": name}
