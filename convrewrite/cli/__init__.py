"""The command line. The only wing that prints and exits."""

from convrewrite.cli.entry import main, run
from convrewrite.cli.progress import progress_bars

__all__ = ["main", "progress_bars", "run"]
