"""The command line. The only wing that prints and exits.

Its parts are imported when they are first used, so that Ctrl-C is handled from the beginning.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convrewrite.cli.entry import main
    from convrewrite.cli.progress import progress_bars

__all__ = ["main", "progress_bars", "run"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def run() -> None:
    """The entry point of the installed command."""
    try:
        from convrewrite.cli.entry import run as begin
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("convrewrite: interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    begin()


def __getattr__(name: str) -> Any:
    if name == "main":
        from convrewrite.cli.entry import main

        return main
    if name == "progress_bars":
        from convrewrite.cli.progress import progress_bars

        return progress_bars
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
