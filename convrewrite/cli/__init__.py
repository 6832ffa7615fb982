"""The command line. The only wing that prints and exits."""

from convrewrite.cli.commands import main, run

__all__ = ["main", "run"]
