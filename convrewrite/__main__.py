"""``python -m convrewrite``: the command line, as the installed command runs it."""

import os
import sys


def leave_working_folder() -> None:
    """Take back that Python looks for modules in the working folder first, as with ``-m``: it may be a stranger's, and what
    is called like a library in it must not run in its place. Where the package itself lies there, the folder comes last."""
    try:
        here = os.getcwd()
    except OSError:  # there is none any more, as the command tells
        return
    if sys.flags.safe_path or sys.path[:1] not in ([""], [here]):
        return
    del sys.path[0]
    if os.path.samefile(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), here):
        sys.path.append(here)


if __name__ == "__main__":
    leave_working_folder()

    from convrewrite.cli import run

    run()
