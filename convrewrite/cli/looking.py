"""The commands that look at what was made: one report, several side by side, and what their JSON holds."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from convrewrite.cli.interrupts import tells_what_stands
from convrewrite.cli.options import AsJson
from convrewrite.cli.voice import say, say_as_it_is, say_json, width
from convrewrite.errors import UsageError
from convrewrite.values import shown

PAGE = "report.html"
Results = Annotated[list[Path], typer.Argument(metavar="OUT", help="Result folders.")]


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A result folder.")],
    opened: Annotated[bool, typer.Option("--open", help="Show its page in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the report of a result again."""
    from convrewrite.reporting import render_text
    from convrewrite.results import read_report

    found = read_report(out)
    if as_json:
        say_json(found)
    else:
        say(render_text(found, width=width()))
    if opened:
        if not (out / PAGE).is_file():
            raise UsageError(f"{out / PAGE}: expected the page of the result, found none; leave --open out")
        page = (out / PAGE).absolute()
        if not webbrowser.open(page.as_uri()):
            raise UsageError(
                f"--open: expected a browser to show {page}, found none that can be started here; open it yourself"
            )


@tells_what_stands
def compare(
    *,
    outs: Results,
    page: Annotated[Path | None, typer.Option("--page", help="Write the table as an HTML file, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show results side by side: what is left of each one's cost, and how near it is to its original."""
    from convrewrite import folders
    from convrewrite.reporting import Compared
    from convrewrite.results import read_report

    compared = Compared.of([(str(out), read_report(out)) for out in outs])
    if page is not None:
        folders.write_new(page, compared.page())
    if as_json:
        say_json(compared)
        return
    say(compared.text())
    if page is not None:
        say(f"Written to {page}")


def schema(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="As `convrewrite schema` without a name lists them.")
    ] = None,
) -> None:
    """Print the JSON schema of what a command prints with --json; without NAME, which there are."""
    import json

    from convrewrite.cli.json_forms import SCHEMAS, schema_of
    from convrewrite.tables import table

    if name is None:
        say(table(("name", "printed by"), [(name, commands) for name, (_, commands) in SCHEMAS.items()], "ll"))
        return
    if name not in SCHEMAS:
        raise UsageError(f"schema: expected {', '.join(SCHEMAS)}, found {shown(name)}")
    say_as_it_is(json.dumps(schema_of(SCHEMAS[name][0]), indent=2))
