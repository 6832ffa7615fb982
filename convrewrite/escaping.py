"""Text from elsewhere, shown as it stands: names, keys and messages may hold what a terminal or a page would act upon."""

import re

TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""Sequences that colour what a terminal shows."""


def printable(text: str, keep: str = "") -> str:
    r"""The text with every control, format and direction character written out, as ``\x1b``; those in ``keep`` stay.

    Letters of every script, digits, punctuation and the plain space are shown as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def message_of(error: BaseException | None) -> str:
    """The text of an error from elsewhere; empty where its own ``__str__`` fails."""
    try:
        return str(error)
    except Exception:  # it is code from elsewhere, too
        return ""
