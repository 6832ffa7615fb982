"""How much a command says: nothing but errors with ``--quiet``, what the library logs with ``-v``; and the functions that
print."""

import codecs
import inspect
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from convrewrite.errors import ConvRewriteError, UsageError
from convrewrite.escaping import printable
from convrewrite.folders import disk_full
from convrewrite.interrupts import held
from convrewrite.tables import WIDTH, shortened

if TYPE_CHECKING:
    from pydantic import BaseModel

LIBRARY = "convrewrite"
"""The parent of all loggers of the library."""

NOT_ASCII = re.compile(r"[^\x00-\x7f]")
"""A character that JSON in another encoding than UTF-8 has by its number."""

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
"""The levels of the log that are shown without ``-v``, with ``-v`` and with ``-vv``."""

Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="Say nothing but errors: no progress, no table. JSON is still printed.")
]
Verbose = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        show_default=False,
        help="Say on the error stream what is decided and why; -vv for more.",
    ),
]


@dataclass(frozen=True, slots=True)
class Voice:
    """What was asked for: silence, or how many ``-v``."""

    quiet: bool = False
    verbose: int = 0


_VOICE: ContextVar[Voice | None] = ContextVar("voice", default=None)

_OWN: ContextVar[IO[str] | None] = ContextVar("own", default=None)
"""Standard output, while what others print goes to the error stream."""


def is_quiet() -> bool:
    """Whether the command that runs says nothing but errors."""
    voice = _VOICE.get()
    return voice is not None and voice.quiet


@contextmanager
def speaking(quiet: bool, verbose: int) -> Iterator[None]:
    """Inside the block as much is said as was asked for, here or around it. Raises UsageError for both ``quiet`` and
    ``verbose``."""
    around = _VOICE.get() or Voice()
    voice = Voice(quiet or around.quiet, verbose or around.verbose)
    if voice.quiet and voice.verbose:
        raise UsageError("--quiet, --verbose: expected one of them, found both; leave one out")
    token = _VOICE.set(voice)
    logger, handler = logging.getLogger(LIBRARY), _ToErrorStream()
    before = logger.level
    if voice.verbose:
        if not around.verbose:  # otherwise the one around this block writes
            logger.addHandler(handler)
        logger.setLevel(LEVELS[min(voice.verbose, len(LEVELS) - 1)])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        _VOICE.reset(token)


class _ToErrorStream(logging.Handler):
    """Writes to what ``sys.stderr`` is at that moment: progress in a terminal puts a stream of its own there, so that bars are
    drawn below the lines."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """One line, in which names from elsewhere do nothing to the terminal: seconds since the command began, where, what."""
        where = record.name.removeprefix(f"{LIBRARY}.")
        text = printable(record.getMessage().replace("\n", " "))
        with held():  # a line that is half written would run into the message about an interrupt
            say_aside(f"[{time.monotonic() - self._began:7.1f} s] {where}: {text}")


def spoken(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, with ``--quiet`` and ``--verbose``."""
    signature = inspect.signature(command, eval_str=True)
    added = {"quiet": (False, Quiet), "verbose": (0, Verbose)}
    taken = [
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (default, annotation) in added.items()
        ),
    ]

    @wraps(command)
    def run(*, quiet: bool, verbose: int, **given: Any) -> None:
        with speaking(quiet, verbose), apart(), _room_told():
            command(**given)

    run.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return run


@contextmanager
def apart() -> Iterator[None]:
    """Inside the block standard output is the command's own: what others print there, as a model's own code does, goes to the
    error stream."""
    own = sys.stdout
    token = _OWN.set(own)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = own
        _OWN.reset(token)


class Unprinted(Exception):
    """Standard output cannot be written; the text says what the system says."""


@contextmanager
def _room_told() -> Iterator[None]:
    """Raise UsageError for a full disk, unless it is where the output goes: what is printed is the last that a command does, and
    here its work is not done."""
    try:
        yield
    except (ConvRewriteError, Unprinted):
        raise
    except Exception as error:
        if (reason := disk_full(error)) is None:
            raise
        raise UsageError(
            f"expected room for what is written, temporary files included, found none ({reason}); make some, or name other "
            "places, for temporary files in TMPDIR"
        ) from error


def own_output() -> IO[str]:
    """Standard output, for the command itself."""
    return _OWN.get() or sys.stdout


def width() -> int:
    """Columns of what is printed: those of a terminal, if that has more than the :data:`~convrewrite.tables.WIDTH` of a pipe."""
    return max(WIDTH, shutil.get_terminal_size().columns) if own_output().isatty() else WIDTH


def say(text: str, *, as_it_is: bool = False) -> None:
    """Print lines, in which names from elsewhere can do nothing to the terminal; none with ``--quiet``. Long ones are wrapped,
    unless they are of a file that is shown ``as_it_is``."""
    if not is_quiet():
        shown = _encodable(printable(text, keep="\n\t"))
        say_as_it_is(shown if as_it_is else shortened(shown, width()))


def say_as_it_is(text: str) -> None:
    """Print a text. Raises BrokenPipeError where nobody reads it, Unprinted where it finds no room."""
    try:
        typer.echo(text, file=own_output())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unprinted(error.strerror) from error


def say_aside(line: str) -> None:
    """Print a line on the error stream. Where that cannot be written, as a log on a full disk, it is lost, and the work goes on.
    Raises BrokenPipeError where the program that reads it has ended."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        return


def say_json(told: "BaseModel | Sequence[BaseModel]") -> None:
    """Print a value as JSON, or several as a list."""
    if isinstance(told, Sequence):
        text = "[" + ",\n".join(value.model_dump_json(indent=2, by_alias=True) for value in told) + "]"
    else:
        text = told.model_dump_json(indent=2, by_alias=True)
    say_json_text(text)


def say_json_text(text: str) -> None:
    """Print a text that is JSON already. Characters in names that would do something to a terminal have their numbers there."""
    if _encoding() != "utf-8":  # JSON is read as UTF-8, of which ASCII is a part
        text = NOT_ASCII.sub(lambda found: _numbered(found[0]), text)
    shown = (line if line.isprintable() else "".join(map(_shown, line)) for line in text.split("\n"))
    say_as_it_is("\n".join(shown))


def _shown(character: str) -> str:
    return character if character.isprintable() else _numbered(character)


def _numbered(character: str) -> str:
    """A character as JSON can write every one: by its number in UTF-16."""
    halves = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{halves[start : start + 4]}" for start in range(0, len(halves), 4))


def _encodable(text: str) -> str:
    """The text with characters that standard output has no bytes for written out, as ``\\u73ed`` where it is in latin-1."""
    encoding = _encoding()
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _encoding() -> str:
    """That of standard output, by the name that Python gives it."""
    return codecs.lookup(getattr(own_output(), "encoding", None) or "utf-8").name
