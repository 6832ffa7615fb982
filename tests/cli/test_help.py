"""Every ``--help`` ends with commands that work, and reads well at 80 columns."""

import shlex
from typing import Any

import pytest
import typer
from commands import call
from rich.markup import render

from convrewrite.cli.commands import app
from convrewrite.cli.grouped import _all

ROOT: Any = typer.main.get_command(app)
COMMANDS = dict(_all(ROOT, ()))
GROUPS = {"": ROOT, "rules": ROOT.commands["rules"]}


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


def examples_of(command: Any) -> list[str]:
    first, *examples = (command.epilog or "").split("\n\n")
    assert first == "Examples:"
    return examples


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS])
def test_every_help_ends_with_examples_and_fits_a_terminal(name: str) -> None:
    examples = examples_of((COMMANDS | GROUPS)[name])
    assert 1 <= len(examples) <= 3
    ran = call(*name.split(), "--help")
    assert (ran.code, ran.err) == (0, "")
    lines = [line.rstrip() for line in ran.out.splitlines()]
    assert max(map(len, lines)) <= 80
    shown = [line.strip() for line in lines]
    assert [line for line in shown if line][-len(examples) :] == examples


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS])
def test_nothing_of_a_help_is_taken_for_markup(name: str) -> None:
    command = (COMMANDS | GROUPS)[name]
    texts = [command.help, *(parameter.help for parameter in command.params if getattr(parameter, "help", None))]
    assert [text for text in texts if render(text).plain != text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_one_of_its_command_and_parses(name: str) -> None:
    """By the command's own options and the checks of their values; nothing is run."""
    for example in examples_of(COMMANDS[name]):
        words = shlex.split(example.partition(" > ")[0])
        head = ["convrewrite", *name.split()]
        assert words[: len(head)] == head
        context = COMMANDS[name].make_context(
            name, words[len(head) :], parent=ROOT.make_context("convrewrite", head[1:])
        )
        assert not context.protected_args if hasattr(context, "protected_args") else not context.args
        given = [parameter for parameter in COMMANDS[name].params if context.params.get(parameter.name) is not None]
        assert given


@pytest.mark.parametrize("name", GROUPS)
def test_the_examples_of_a_group_are_of_its_commands(name: str) -> None:
    for example in examples_of(GROUPS[name]):
        words = shlex.split(example)
        assert words[:1] == ["convrewrite"]
        path = " ".join(words[1 : 2 + len(name.split())])
        assert path in COMMANDS
        if "--help" not in words:
            COMMANDS[path].make_context(path, words[1 + len(path.split()) :])
