"""The command line. The only wing that prints and exits."""

from convrewrite.cli.entry import main, run

__all__ = ["main", "run"]
