"""Text from elsewhere, made harmless to show: names, keys and messages may hold what a terminal or a page would act upon."""

import re
from collections.abc import Iterator

TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""Sequences that colour what a terminal shows."""

CAUSE_LENGTH = 300
"""Most letters that are shown of somebody else's message."""

BLAMED = re.compile(r'The following call raised this error:\s+File "(.+?)", line (\d+), in (\S+)\n *([^\n]*)')
"""Where torch's exporter names the line of a forward that it cannot follow: after several lines of advice, and the place
that it names in them may be one of the code that called it."""


def printable(text: str, keep: str = "") -> str:
    r"""The text with every control, format and direction character written out, as ``\x1b``; those in ``keep`` stay.

    Letters of every script, digits, punctuation and the plain space are shown as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_text(name: str) -> str:
    """A name with its bytes that are no UTF-8 written out: Python has them as halves of surrogate pairs, which no text file can
    hold."""
    return name.encode("utf-8", "backslashreplace").decode()


def message_of(error: BaseException | None) -> str:
    """The text of an error from elsewhere; empty where its own ``__str__`` fails."""
    try:
        return str(error)
    except Exception:  # it is code from elsewhere, too
        return ""


def first_line(error: BaseException | None, most: int | None = None) -> str:
    """The first line of an error from elsewhere, up to so many letters; its type where it says nothing."""
    lines = message_of(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def one_line(error: BaseException | None, most: int | None = None) -> str:
    """The whole text of an error from elsewhere in one line, up to so many letters; its type where it says nothing."""
    return " ".join(message_of(error).split())[:most] or type(error).__name__


def summary(error: BaseException | None, most: int = 200) -> str:
    """The type of an error from elsewhere, and the first line of what it says, up to so many letters."""
    kind = type(error).__name__
    return f"{kind}: {first_line(error, most)}" if message_of(error).strip() else kind


def led_to(error: BaseException | None, *, contexts: bool = True) -> Iterator[BaseException]:
    """An error, the one it was raised from (with ``contexts`` otherwise the one it was raised while handling), and so on. Each
    comes once, as code from elsewhere may raise an error from one that was raised from it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if contexts else None)


def innermost_cause(error: BaseException) -> str:
    """The exception at the start of a chain of ``raise ... from ...``, in one line; first the line of a forward that torch
    blames, if it does."""
    *_, error = led_to(error, contexts=False)
    said = TERMINAL_COLOUR.sub("", message_of(error))
    blamed = BLAMED.search(said)
    if blamed is not None:
        file, line, function, code = blamed.groups()
        said = f"in {function}, line {line} of {file} ({code.strip()}): {said.strip().splitlines()[0]}"
    text = " ".join(said.split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= CAUSE_LENGTH else line[: CAUSE_LENGTH - 3] + "..."
