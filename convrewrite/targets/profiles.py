"""Times that were measured on another machine: written there, read where a plan is made.

A folder of graphs has one ONNX file for each option at each geometry, and ``graphs.json``, which says what is compared with what.
Timing them needs a runtime and numpy, but no torch: besides the graphs only the original goes to the device, where it is timed as
a whole.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convrewrite.errors import UsageError
from convrewrite.escaping import one_line
from convrewrite.folders import made_aside, read_text, require_room_beside, resolved, write_errors
from convrewrite.json_texts import each_key_once
from convrewrite.machine import processor
from convrewrite.targets.interleaving import framed_seconds, whole_seconds
from convrewrite.targets.target import Compiled, Program, Target
from convrewrite.values import counted

OTHER = "another file with -o"

FORMAT = 1
"""Number of the format of both files."""

GRAPHS = "graphs.json"
ORIGINAL = "original"
"""The key of the whole original's seconds, and the name of its file."""

MOST_TIMES = 1_000_000
"""Most times in a file: ten times as many as the largest network of a zoo asks for."""

MOST_SECONDS = 1e9
"""Most seconds of one time in a file: thirty years, of which a thousand times as many still add up."""

MOST_NUMBERS = 1 << 28
"""Most numbers in an input."""

TYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""Types of inputs, as numpy calls them."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of options by key, on a machine: the runtime with its version, the processor, its channel block, and threads.

    A time may be infinite: that runtime cannot run the option. ``model`` identifies the original, as its time is not that of
    other models; None in files of earlier versions, which are then trusted.
    """

    runtime: str
    version: str
    processor: str
    block: int
    threads: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    model: str | None = None

    @staticmethod
    def check_place(path: Path) -> None:
        """Raise UsageError unless timings can be written to ``path``: called before any long work."""
        with write_errors(path, OTHER):
            place = resolved(path)
            if place.exists() and not (place.is_file() and (place.stat().st_size == 0 or _holds_timings(place))):
                raise UsageError(f"{path}: holds something else than timings, which would be lost; name {OTHER}")
            require_room_beside(place)

    def describe(self) -> str:
        """As in a note of a report."""
        return f"{self.runtime} {self.version} on {self.processor}, {counted(self.threads, 'thread')}"

    def to_json(self) -> str:
        """The text of a file of timings; what cannot run is null there."""
        told = {key: value if math.isfinite(value) else None for key, value in self.seconds.items()}
        return json.dumps({"format": FORMAT, **asdict(self), "seconds": told}, indent=1) + "\n"


def read_profile(path: Path) -> Profile:
    """A file of timings. Raises UsageError for one that is missing, or anything else."""
    try:
        entries = each_key_once(read_text(path, UsageError, "a file of timings"))
        if not isinstance(entries, dict) or not _is_current(entries.pop("format", None)):
            raise ValueError("not a file of timings of this version")
        profile = Profile(**entries)
        return Profile(**{**entries, "seconds": _seconds(profile)})
    except (ValueError, TypeError, RecursionError) as error:
        reason = one_line(error, 150)
        raise UsageError(f"--timings {path}: expected a file written by `convrewrite profile`: {reason}") from error


def _is_current(found: object) -> bool:
    """Whether a file says that it is of this format; true, which is no number, equals 1."""
    return type(found) is int and found == FORMAT


def _seconds(profile: Profile) -> dict[str, float]:
    """The seconds, checked, as a file comes from elsewhere."""
    texts = (profile.runtime, profile.version, profile.processor)
    numbers = (profile.block, profile.threads)
    if not all(isinstance(x, str) for x in texts) or not all(type(x) is int and 1 <= x <= 4096 for x in numbers):
        raise ValueError("expected names of runtime and processor, and whole numbers for block and threads")
    if profile.model is not None and not isinstance(profile.model, str):
        raise ValueError("expected a text that tells the model")
    if not isinstance(profile.seconds, dict) or len(profile.seconds) > MOST_TIMES:
        raise ValueError("expected seconds by key")
    found = {key: math.inf if value is None else value for key, value in profile.seconds.items()}
    for key, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"expected seconds above 0 for {key[:40]}, found {str(value)[:40]}")
        if value > MOST_SECONDS and value != math.inf:
            raise ValueError(f"expected seconds up to {MOST_SECONDS:g} for {key[:40]}, found {str(value)[:40]}")
    if found.get(ORIGINAL) == math.inf:
        raise ValueError("expected the seconds of the original, found that it cannot run there; name another runtime")
    return {key: float(value) for key, value in found.items()}


def _holds_timings(place: Path) -> bool:
    try:
        read_profile(place)
    except UsageError:
        return False
    return True


def save_profile(profile: Profile, path: Path) -> None:
    """Write timings aside and put them in their place. Raises UsageError when that fails."""
    Profile.check_place(path)
    with made_aside(path, OTHER) as made:
        made.write_text(profile.to_json(), encoding="utf-8")


def is_graphs(folder: Path) -> bool:
    """Whether a folder holds graphs to time."""
    return (folder / GRAPHS).is_file()


def list_graphs(
    folder: Path,
    groups: Sequence[Mapping[str, Any]],
    inputs: Sequence[Mapping[str, Any]],
    model: str,
    examples: int,
) -> None:
    """Write what the graphs in a folder are: of every group the frame, the original and its options, and the shape of their
    input; the inputs of the whole original, the ``examples`` in these, and ``model``, which identifies it."""
    told = {
        "format": FORMAT, "model": model, "examples": examples, "inputs": list(inputs), "groups": list(groups),
    }  # fmt: skip
    (folder / GRAPHS).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def profile_graphs(folder: Path, target: Target, threads: int, rounds: int) -> Profile:
    """Time the graphs in a folder. Raises UsageError for a folder that was not written for this, for a target that takes modules,
    and where the target cannot run an original."""
    if target.takes == "module":
        raise UsageError(
            f"--runtime {target.name}: expected a runtime that takes ONNX files, as {folder} holds them; name another, or "
            "profile the model itself (`convrewrite profile MODEL`), where torch is"
        )
    try:
        found = each_key_once(read_text(folder / GRAPHS, UsageError, "a list of graphs"))
        if not _is_current(found["format"]):
            raise ValueError(f"format {found['format']}")
        groups = [(_keys(group["graphs"]), _ones(group["input"])) for group in found["groups"]]
        inputs = [_input(entry) for entry in found["inputs"]]
        examples = found["examples"] if "examples" in found else len(inputs[0])  # as earlier versions wrote it
        if type(examples) is not int or not 1 <= examples <= MOST_NUMBERS:
            raise ValueError(f"expected how many examples the inputs hold, found {examples}")
        model = found.get("model")
        if model is not None and not isinstance(model, str):
            raise ValueError("expected a text that tells the model")
    except (ValueError, TypeError, LookupError, OverflowError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder / GRAPHS}: expected what `convrewrite profile --graphs` writes: {error}") from error
    parts: dict[str, float] = {}
    with target.at_work(threads):
        run = _Made(folder, ORIGINAL, inputs, target, threads).required()
        unit = _first_of(groups, folder, target, threads)
        for (frame, *keys), ones in groups:
            first, *others = (_Made(folder, key, [ones], target, threads) for key in keys)
            times = framed_seconds(
                [first.required, *(other.possible for other in others)],
                _Made(folder, frame, [ones], target, threads).required(),
                rounds=rounds, min_seconds=0.001, clock=target.clock(threads), unit=unit,
            )  # fmt: skip
            parts |= dict(zip(keys, times, strict=True))
        clock = target.clock(threads)
        whole = whole_seconds(run, rounds=rounds, min_seconds=0.01, clock=clock, unit=unit)
        [speed] = (
            framed_seconds([lambda: unit[0]], unit[1], rounds=rounds, min_seconds=0.01, clock=clock) if unit else [1.0]
        )
    parts[ORIGINAL] = whole / examples
    seconds = {key: speed * part for key, part in parts.items()}
    return Profile(target.name, target.version(), processor()[0], target.block(), threads, seconds, model)


def _first_of(
    groups: Sequence[tuple[list[str], Any]], folder: Path, target: Target, threads: int
) -> tuple[Compiled, ...]:
    """The first convolution as it is, and its frame: all times are measured as parts of its time, as the device's speed
    changes."""
    if not groups:
        return ()
    (frame, original, *_), ones = groups[0]
    return tuple(_Made(folder, key, [ones], target, threads).required() for key in (original, frame))


def _input(entry: Mapping[str, Any]) -> Any:
    """An input of the original: ones, or the numbers that stand there, as they do where all examples share them."""
    import numpy as np

    ones = _ones(entry["shape"], str(entry["type"]))
    return np.array(entry["values"], ones.dtype).reshape(ones.shape) if "values" in entry else ones


def _ones(shape: Sequence[Any], kind: str = "float32") -> Any:
    """What the graphs run on: their times do not depend on the numbers."""
    import numpy as np

    sizes = [size for size in shape if type(size) is int]
    if len(sizes) != len(shape) or min(sizes, default=1) < 1 or math.prod(sizes) > MOST_NUMBERS or kind not in TYPES:
        raise ValueError(f"expected the shape and type of an input, found {shape} of {kind}")
    return np.ones(sizes, kind)


def _keys(found: Sequence[Any]) -> list[str]:
    """Names of files in the folder, and of nothing outside of it."""
    keys = [str(key) for key in found]
    if len(keys) < 2 or not all(key.isalnum() for key in keys):
        raise ValueError("expected names of graphs, the frame and the original first")
    return keys


@dataclass(frozen=True, slots=True)
class _Made:
    """One graph of a folder, made ready when it is its turn."""

    folder: Path
    key: str
    inputs: Sequence[Any]
    target: Target
    threads: int

    def required(self) -> Compiled:
        """Raises UsageError where the target cannot run it."""
        path = self.folder / f"{self.key}.onnx"
        try:
            return self.target.compile(Program(onnx=path), self.inputs, self.threads)
        except Exception as error:  # every runtime raises its own
            cause = one_line(error, 200)
            raise UsageError(f"--runtime {self.target.name}: cannot run {path}: {cause}") from error

    def possible(self) -> Compiled | None:
        """None where the target cannot run it."""
        try:
            return self.required()
        except UsageError:
            return None
