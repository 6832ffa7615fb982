"""The way into the command line and out of it: one command is run, and every error becomes a message and an exit code."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import typer

from convrewrite import machine, values
from convrewrite.cli.commands import app
from convrewrite.cli.interrupts import INTERRUPTED, NOTHING, Interrupted, code_of
from convrewrite.cli.unforeseen import TRACEBACK, unforeseen
from convrewrite.cli.voice import Unprinted, say_aside
from convrewrite.errors import ConvRewriteError, ModelError, UsageError
from convrewrite.escaping import printable
from convrewrite.folders import cleared_later, disk_full
from convrewrite.interrupts import Terminated, ignored_from_here, put_back, signals_raised
from convrewrite.tables import shortened

_EXITED = "expected code of the model that comes to an end, found that it ended the process (sys.exit({found})); take that out"
"""For a forward or a factory that ends the process; its number is no exit code of this tool."""

NOBODY_READS = 141
"""Exit code where the program that reads the output has ended (``| head``): that of programs that the signal SIGPIPE (13)
ends."""


WRITING = ("optimize", "plan", "apply", "sweep", "recover", "quantise", "export", "profile")
"""Commands that write something besides what they print, and do so before."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Afterwards signals do in this process what they did before."""
    with put_back(), cleared_later():
        return _main(argv)


def _main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Every error this package raises on purpose is caught here and only here."""
    words = sys.argv[1:] if argv is None else argv
    try:
        values.check_words(words)
        _require_working_folder()
        # A command returns nothing; a number is the code of typer.Exit, into which typer turns Ctrl-C outside a command.
        with signals_raised():
            code = int(_commands()(words, standalone_mode=False, obj=words) or 0)
            sys.stdout.flush()  # what cannot be written is found here, not at the exit
        return code if code != INTERRUPTED else interrupted(NOTHING, code)
    except ConvRewriteError as error:
        _complain(str(error))
        return error.exit_code
    except Interrupted as error:
        return interrupted(str(error), error.code)
    except (typer.Abort, KeyboardInterrupt, Terminated) as error:
        return interrupted(NOTHING, code_of(error))
    except SystemExit as error:  # none of our code raises it, and click does where nobody reads
        if isinstance(error.__context__, BrokenPipeError):
            return _unread()
        _complain(printable(_EXITED.format(found=repr(error.code)[:60])))
        return ModelError.exit_code
    except BrokenPipeError:
        return _unread()
    except Exception as error:
        # For files a full disk is reported where they are written.
        if (reason := str(error) if isinstance(error, Unprinted) else disk_full(error)) is not None:
            _say_no_more()
            _complain(f"standard output: cannot be written ({reason}); {_left_by(words)}")
            return 2
        if not hasattr(error, "format_message"):  # click's usage errors have it; typer re-exports no common base
            return _unforeseen(error)
        if message := error.format_message().rstrip("."):  # without arguments the help is shown, and that is all
            _complain(f"{printable(message)}; see --help")
        return 2


@cache
def _commands() -> Any:
    """The commands, made of their functions once in a process: that takes longer than to call one."""
    return typer.main.get_command(app)


def _require_working_folder() -> None:
    """Raise UsageError where there is none: libraries of torch end the process then, and say that a file of theirs is missing."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            f"expected a working folder that is there, found none ({error.strerror}): it was removed or moved; go to another (cd)"
        ) from error


def _left_by(words: Sequence[str]) -> str:
    """What to know, or do, where a command could not print that it is done."""
    if any(word in WRITING for word in words):
        return "what the command writes is whole"
    return "send it elsewhere, or make room"


def _unread() -> int:
    """Say nothing more, as nobody reads it; returns the exit code."""
    _say_no_more()
    return NOBODY_READS


def _say_no_more() -> None:
    """Drop what standard output still holds, which would fail once more at the exit."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def _leave_nothing_unwritten() -> None:
    """Drop what a stream that nobody reads still holds: Python would try to write it at the exit, fail, and end with a code of
    its own."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError):
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends


def _complain(text: str) -> None:
    """Say what went wrong on the error stream: in one line, or in a terminal wrapped between words."""
    if sys.stderr is None:  # closed, and the process was interrupted before it was replaced
        return
    line = f"convrewrite: {text}"
    with suppress(BrokenPipeError):
        say_aside(shortened(line) if sys.stderr.isatty() else line)


def interrupted(stands: str, code: int) -> int:
    """Say that an interrupt ended the command, and what is now where it was to write; returns the exit code."""
    _complain(f"interrupted; {stands}")
    return code


def _unforeseen(error: Exception) -> int:
    """Report an error that nobody caught, in one line; returns the exit code."""
    if os.environ.get(TRACEBACK):
        raise error
    _complain(unforeseen(error))
    return ModelError.exit_code


def _open_what_is_closed() -> None:
    """Let standard streams that the caller closed (``>&-``) lead nowhere; otherwise the next file opened would take their number,
    and receive what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def run() -> None:
    """The entry point of the installed command, within the memory that the machine has, and beside what else runs there."""
    try:
        with signals_raised(), cleared_later():
            _open_what_is_closed()
            machine.share_processor()
            machine.keep_heap()
            machine.limit_memory(int(machine.memory_bytes() * machine.SHARE))
            code = _main()
            ignored_from_here()
    except (KeyboardInterrupt, Terminated) as error:
        ignored_from_here()
        code = interrupted(NOTHING, code_of(error))
    _leave_nothing_unwritten()
    sys.exit(code)
