"""What the command line says of an error that nobody caught: too little memory, too deep a model, or a fault of its own."""

import re

from convrewrite.escaping import CAUSE_LENGTH, message_of, printable

TRACEBACK = "CONVREWRITE_TRACEBACK"
"""The environment variable that asks for the traceback."""

FAULT = "this is a fault of convrewrite itself"
"""Words in the message of every unforeseen error."""

_NO_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|out of memory|bad_alloc|Cannot allocate memory|"
    r"failed to map segment from shared object$",
    re.IGNORECASE,
)


def unforeseen(error: Exception) -> str:
    """One line for the error: what happened, and what to do."""
    lines = printable(message_of(error), keep="\n").strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:CAUSE_LENGTH]}" if lines else type(error).__name__
    if isinstance(error, MemoryError) or _NO_MEMORY.search(message_of(error)):
        return (
            f"expected to get by with the memory of this machine, but it is not enough ({text}); "
            "give smaller inputs (--input), fewer calibration inputs, or a lower --memory where the command has it"
        )
    if isinstance(error, RecursionError):
        return (
            f"expected a model that Python can walk through, found one that is nested too deeply ({text}); flatten it"
        )
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{str(error.filename)[:CAUSE_LENGTH]!r}: "
        return f"{where}the system refused it ({error.strerror}); name another file or folder, or make room"
    return f"{FAULT} ({text}); set {TRACEBACK}=1 to see where, and report it"
