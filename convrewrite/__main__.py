"""``python -m convrewrite``: the command line, as the installed command runs it."""

from convrewrite.cli import run

if __name__ == "__main__":
    run()
