"""Pages that are made when the site is built: all commands, from the code, and the README, which other pages link to."""

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from convrewrite.cli.commands import app


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "readme.md", content=readme()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead to the README in the repository lead to its page in the site."""
    return markdown.replace("](../README.md", "](readme.md")


def readme() -> str:
    """The README; links to files that are no part of the site become text."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(
        r"!?\[([^\]]+)\]\((?!https?:|#|[\w.-]+\.md(#[\w-]+)?\))[^)]+\)|\[([^\]]+)\]\([A-Z]+\.md[^)]*\)", _text_of, text
    )


def _text_of(link: re.Match[str]) -> str:
    return link[1] or link[3]


def commands() -> str:
    """Every command with its arguments and options, in Markdown."""
    root = typer.main.get_command(app)
    return "# Every command\n\nMade from the code; `--help` behind a command says the same.\n\n" + "\n\n".join(
        part
        for name, command in sorted(root.commands.items())
        for part in _command(name, command)  # type: ignore[attr-defined]
    )


def _command(name: str, command: Any) -> list[str]:
    inner = getattr(command, "commands", {})
    if inner:
        return [part for word, one in inner.items() for part in _command(f"{name} {word}", one)]
    rows = [(_names(one), one.help or "") for one in command.params if one.name != "help"]
    table = ["| | |", "|---|---|", *(f"| {_cell(names)} | {_cell(text)} |" for names, text in rows)]
    _, *examples = command.epilog.split("\n\n")
    shown = "\n".join(f"    {example}" for example in examples)
    return [f"## {name}", command.help or "", shown, "\n".join(table) if rows else ""]


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name).upper()}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
