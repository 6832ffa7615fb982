"""The way into the command line and out of it: one command is run, and every error becomes a message and an exit code."""

import os
import sys

import typer

from convrewrite import machine, values
from convrewrite.cli.commands import app
from convrewrite.cli.interrupts import INTERRUPTED, NOTHING, Interrupted, code_of
from convrewrite.cli.unforeseen import TRACEBACK, unforeseen
from convrewrite.errors import ConvRewriteError, ModelError
from convrewrite.escaping import printable
from convrewrite.folders import cleared_later, disk_full
from convrewrite.interrupts import Terminated, ignored_from_here, put_back, terminations_raised

_EXITED = "expected code of the model that comes to an end, found that it ended the process (sys.exit({found})); take that out"
"""What a forward or a factory may do; its number is no exit code of this tool."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. What signals do in this process is afterwards as it was."""
    with put_back(), cleared_later():
        return _main(argv)


def _main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Every error this package raises on purpose is caught here and only here."""
    try:
        words = sys.argv[1:] if argv is None else argv
        values.check_words(words)
        # A command returns nothing; a number is the code of typer.Exit, into which typer turns Ctrl-C outside a command.
        with terminations_raised():
            code = int(app(words, standalone_mode=False, obj=words) or 0)
        return code if code != INTERRUPTED else interrupted(NOTHING, code)
    except ConvRewriteError as error:
        print(f"convrewrite: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as error:
        return interrupted(str(error), error.code)
    except (typer.Abort, KeyboardInterrupt, Terminated) as error:
        return interrupted(NOTHING, code_of(error))
    except SystemExit as error:  # nothing of ours asks for it
        print(f"convrewrite: {printable(_EXITED.format(found=repr(error.code)[:60]))}", file=sys.stderr)
        return ModelError.exit_code
    except Exception as error:
        if (reason := disk_full(error)) is not None:  # of files it is told where they are written
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what it still holds would fail once more at the exit
            print(
                f"convrewrite: standard output: cannot be written ({reason}); what -o names is whole", file=sys.stderr
            )
            return 2
        if not hasattr(error, "format_message"):  # click's usage errors have it; typer re-exports no common base
            return _unforeseen(error)
        if message := error.format_message().rstrip("."):  # without arguments the help is shown, and that is all
            print(f"convrewrite: {printable(message)}; see --help", file=sys.stderr)
        return 2


def interrupted(stands: str, code: int) -> int:
    """Say that an interrupt ended the command, and what stands where it was to write; returns the exit code."""
    print(f"convrewrite: interrupted; {stands}", file=sys.stderr)
    return code


def _unforeseen(error: Exception) -> int:
    """Say in one line what nobody caught; the exit code."""
    if os.environ.get(TRACEBACK):
        raise error
    print(f"convrewrite: {unforeseen(error)}", file=sys.stderr)
    return ModelError.exit_code


def run() -> None:
    """The entry point of the installed command, within the memory that the machine has."""
    try:
        with terminations_raised(), cleared_later():
            machine.limit_memory(int(machine.memory_bytes() * machine.SHARE))
            code = _main()
            ignored_from_here()
    except (KeyboardInterrupt, Terminated) as error:
        ignored_from_here()
        code = interrupted(NOTHING, code_of(error))
    sys.exit(code)
