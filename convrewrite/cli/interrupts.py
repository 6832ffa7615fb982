"""What a command that writes says when it is interrupted: which result is in the place it was given."""

import os
import re
import signal
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from convrewrite.errors import UsageError
from convrewrite.interrupts import Terminated, ignored_from_here, interrupts_told

NOTHING = "nothing was written"

SIGNALLED = 128
"""What is added to the number of a signal for the exit code after it, as in shells."""

INTERRUPTED = SIGNALLED + signal.SIGINT
Options = ParamSpec("Options")


class Interrupted(Exception):
    """A command was interrupted; the text says what is in its place, and ``code`` is the exit code."""

    def __init__(self, stands: str, code: int) -> None:
        super().__init__(stands)
        self.code = code


def tells_what_stands(command: Callable[Options, None]) -> Callable[Options, None]:
    """The same command; it raises Interrupted when it is interrupted. A UsageError tells of the state of a training, too."""

    @wraps(command)
    def run(*args: Options.args, **options: Options.kwargs) -> None:
        if command.__name__ in PLACED and options["out"] is None:
            options["out"] = default_out(command.__name__, options)
        put = _put(command.__name__, options)
        state = checkpoint_of(put) if put is not None and command.__name__ == "recover" else None
        before, earlier = _identity(put), _saved(state)
        try:
            with interrupts_told():
                command(*args, **options)
                ignored_from_here()
        except (KeyboardInterrupt, Terminated, UsageError) as error:
            saved = state is not None and _identity(put) == before and _saved(state) not in (None, earlier)
            goes_on = _going_on(state, bool(options.get("resume", True))) if state is not None and saved else ""
            if isinstance(error, UsageError):
                if not goes_on:
                    raise
                raise UsageError(f"{error}{goes_on}") from error  # as of a result that finds no room, after hours
            stands = _standing(put, before)
            stands = "there is no result yet" if goes_on and stands == NOTHING else stands
            raise Interrupted(f"{stands}{goes_on}", code_of(error)) from error

    return run


INT8 = "model.int8.onnx"
"""What ``quantise`` puts into a folder that stays the same."""


def _put(command: str, options: Mapping[str, object]) -> Path | None:
    """What a command with these options puts in its place in one step; None where it writes nothing."""
    if command in ("analyze", "compare"):
        named = options["page"]
    else:
        named = options.get("new") or options["out"] or options.get("graphs")
    if named is None:
        return None
    return Path(str(named)) / INT8 if command == "quantise" else Path(str(named))


PLACED = ("optimize", "apply", "plan", "sweep")
"""Commands that have a default place to write to; `profile` is given one of two."""

ENDINGS = {"plan": "-plan.json", "sweep": "-sweep"}
"""What follows the model's name in a command's default place; otherwise ``-rewritten``."""


def default_out(command: str, options: Mapping[str, object]) -> Path:
    """A command's default place, in the working folder by the name of the model: ``resnet18-rewritten`` for
    ``nets/resnet18.pt``."""
    model = options.get("model") or options["models"]
    first = str(model[0] if isinstance(model, list) else model)
    stem = Path(first).stem if "." in Path(first).name and ":" not in first else first.rpartition(":")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"
    return Path(name + ENDINGS.get(command, "-rewritten"))


def code_of(error: BaseException) -> int:
    """The exit code after Ctrl-C, or after a signal that ends a process."""
    return SIGNALLED + error.number if isinstance(error, Terminated) else INTERRUPTED


def _standing(put: Path | None, before: tuple[int, int] | None) -> str:
    after = _identity(put)
    if after is None:
        return NOTHING
    return f"what stood in {put} before stands" if after == before else f"{put} holds the new result, whole"


def checkpoint_of(place: Path) -> Path:
    """The file for the state of a training: beside its result, which is whole at every moment."""
    return place.absolute().with_name(f"{place.absolute().name}.recovering")


def _going_on(state: Path, resume: bool) -> str:
    how = "the same command" if resume else "the same command without --no-resume"
    return f"; the state of the training is in {state.name} beside it: {how} goes on from there"


def _saved(state: Path | None) -> tuple[int, int] | None:
    """What differs between one checkpoint and the next; None: there is none."""
    try:
        found = None if state is None else os.stat(state)
    except (OSError, ValueError):
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns)


def _identity(put: Path | None) -> tuple[int, int] | None:
    """What differs between one result and the next, which replaces it while it still exists; None: there is none."""
    if put is None:
        return None
    try:
        found = os.stat(put)
        return None if put.is_dir() and not os.listdir(put) else (found.st_dev, found.st_ino)
    except (OSError, ValueError):
        return None
