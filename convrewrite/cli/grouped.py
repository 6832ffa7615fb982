"""Commands in a group: each with examples, options for how much it says, and the defaults of the project it is called in."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from convrewrite import values
from convrewrite.cli.project import RIVALS, Project, options_of, read_project
from convrewrite.cli.voice import speaking, spoken
from convrewrite.errors import UsageError

LOG = logging.getLogger(__name__)

DEFAULTS = "convrewrite.defaults"
"""Key of a context's ``meta`` for the project's file: its name, and the options that were taken from it."""


def examples_of(*examples: str) -> str:
    """The end of a help: whole command lines, each a paragraph, so that none is broken at 80 columns."""
    return "\n\n".join(("Examples:", *examples))


def command(app: typer.Typer, *examples: str, name: str | None = None) -> Callable[[Any], Any]:
    """Add a function to the commands; ``examples`` are whole command lines, which its ``--help`` ends with."""

    def added(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name, epilog=examples_of(*examples))(spoken(function))
        return function

    return added


class Commands(TyperGroup):
    """The commands. Several values for an option that takes one are refused, as it is unclear which was meant. Options that were
    left out, and that the project has defaults for, are put in front of the words of the command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was named; raises UsageError where one of its options is given twice."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is None or isinstance(command, TyperGroup) or ctx.resilient_parsing:
            return name, command, rest
        parser = command.make_parser(ctx)
        parser.allow_interspersed_args = True  # the group itself, whose context this is, does not
        typed, _, order = parser.parse_args(list(rest))
        for parameter in order:
            if order.count(parameter) > 1 and parameter.param_type_name == "option" and not _repeated(parameter):
                raise UsageError(f"{_word(parameter)}: expected once, found more than once; give one value")
        given = {_word(parameter)[2:]: typed.get(parameter.name) for parameter in order}
        if "help" in given or (project := _project_of(ctx)) is None:
            return name, command, rest
        given |= {key: ctx.find_root().params[key] for key in RIVALS if ctx.find_root().params.get(key)}
        found = project.words(" ".join([*_names(ctx), str(name)]), options_of(command), given)
        words = [word for entry in found.values() for word in entry]
        values.check_words(words)
        ctx.meta[DEFAULTS] = project.name, tuple(f"--{key}" for key in found)
        with speaking(bool(typed.get("quiet")), (typed.get("verbose") or 0) + words.count("--verbose")):
            LOG.info("%s: %s", project.name, " ".join(words) or "nothing for this command")
        if ctx.parent is None:
            ctx.obj = [*ctx.obj[: len(ctx.obj) - len(args)], args[0], *words, *rest]  # what a report says was called
        return name, command, [*words, *rest]

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error about a value that came from the project's file names that file."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            name, options = ctx.meta.get(DEFAULTS, ("", ()))
            if ctx.parent is None and str(error).startswith(tuple(f"{option}:" for option in options)):
                raise UsageError(f"{name}: {error}") from error
            raise


def _project_of(ctx: Any) -> Project | None:
    """What the project's file in the working folder says, unless that is not wanted."""
    root = ctx.find_root()
    if root.params.get("no_config"):
        return None
    return read_project(Path(), {path: options_of(command) for path, command in _all(root.command, ())})


def _all(group: Any, above: tuple[str, ...]) -> Any:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _all(command, (*above, name))
        else:
            yield " ".join((*above, name)), command


def _names(ctx: Any) -> list[str]:
    """The names of the groups that a context is of, without the program's own."""
    return [] if ctx.parent is None else [*_names(ctx.parent), str(ctx.info_name)]


def _repeated(parameter: Any) -> bool:
    return bool(parameter.multiple or getattr(parameter, "count", False))


def _word(parameter: Any) -> str:
    return str(max(parameter.opts, key=len))
