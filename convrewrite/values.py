"""The values of options that are more than a word or a number, read from text, and the limits of those that are numbers.

The limits hold for the Python interface too. A UsageError names the option, what was expected and what was found.
"""

import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence
from numbers import Real

from convrewrite.errors import UsageError

LARGEST_SEED = 2**63 - 1
"""The largest whole number of 64 bits with a sign."""

MOST_THREADS = max(64, os.cpu_count() or 1)
"""Most threads at which latency is timed: as many as the machine has processors, and 64 where it has fewer."""

SMALLEST_MEMORY, LARGEST_MEMORY = 0.001, 2.0**20
"""Least and most of ``--memory``, in GB: a megabyte, and a petabyte, which no machine has."""

MOST_ROUNDS = 10_000
"""Most rounds of a comparison."""

LONGEST_SIDE = 16_384
"""Most pixels on a side of an image that ``--resize`` makes."""

LONGEST_SECONDS = 86_400
"""Most seconds of a limit: a day."""

PROBE_SECONDS = 30.0
"""Seconds that an ONNX file may take to be opened, and again to run once, unless the caller says otherwise: ordinary
files take a few, and one that never ends is reported before the user loses patience."""

AXES = ("batch", "height", "width")
"""Names of axes that an exported file may take in any size: the first one of every input, and the last two of images."""

NEEDS_TIMES = (
    "budget latency: needs measured times; leave out --no-onnx (in Python measure=False), or ask for macs or params"
)
"""The message of a budget of latency where nothing is timed."""

NEEDS_INPUTS = "keep: needs inputs to measure on, and there are none; give real inputs (--calib)"
"""The message of a fidelity to keep where nothing can be measured."""

_SHOWN = 60
"""Most letters of a value that a message shows."""


def shown(value: object) -> str:
    """A value for a message: as Python writes it, and never longer than a line. A huge whole number is described by its length,
    as Python refuses to write out thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"one of {value.bit_length()} bits"
    text = repr(value[: 2 * _SHOWN]) if isinstance(value, str) else str(value)
    length = len(value) if isinstance(value, str) else len(text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}... ({length} characters)"


def shape_text(*shapes: Iterable[int]) -> str:
    """Shapes for a message, ``1x3x8x8``; those of several tensors are separated by commas."""
    return ", ".join("x".join(map(str, shape)) or "a scalar" for shape in shapes)


def some_of(names: Sequence[str], most: int, what: str = "") -> str:
    """The first names, and how many follow: ``a, b and 3 more``, or ``and 3 more sites`` where ``what`` is a site."""
    left = len(names) - most
    rest = counted(left, f"more {what}") if what else f"{left} more"
    return ", ".join(names[:most]) + (f" and {rest}" if left > 0 else "")


def counted(number: int, noun: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def near(word: object, valid: Iterable[str]) -> str:
    """The nearest of the valid words, as a question to end a message with; nothing where none is near."""
    nearest = difflib.get_close_matches(str(word), list(valid), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def check_words(words: Sequence[str]) -> None:
    """Raise UsageError for words of a command line that cannot mean anything: empty ones, and broken names."""
    for word in words:
        if not word.strip():
            raise UsageError(f"expected text in every argument, found {word!r}; give a value, or leave the option out")
        if "\0" in word or any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UsageError(
                f"expected arguments in UTF-8 without NUL, found {shown(word)}; rename the file, quote its name anew, or where "
                "the locale has another encoding set LC_ALL=C.UTF-8"
            )


def seed(value: int, where: str = "--seed") -> int:
    """A seed that every generator takes; ``where`` is what the caller calls the option, here and below."""
    if not 0 <= value <= LARGEST_SEED:
        raise UsageError(f"{where}: expected a whole number from 0 to {LARGEST_SEED}, found {shown(value)}")
    return value


def is_number(value: object) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def threads(value: int, where: str = "--threads") -> int:
    """As many threads as can be of use."""
    if not 1 <= value <= MOST_THREADS:
        expected = f"a whole number greater than or equal to 1 and at most {MOST_THREADS}"
        raise UsageError(f"{where}: expected {expected}, found {shown(value)}; 1 is the default")
    return value


def memory(value: float) -> float:
    """Gigabytes that may be used."""
    if not SMALLEST_MEMORY <= value <= LARGEST_MEMORY:
        raise UsageError(
            f"--memory: expected GB from {SMALLEST_MEMORY:g} to {LARGEST_MEMORY:.0f}, found {shown(value)}; "
            "4 is the default"
        )
    return value


def require_memory(value: int) -> int:
    """The same in bytes, as the Python interface takes it."""
    least, most = int(SMALLEST_MEMORY * 2**30), int(LARGEST_MEMORY * 2**30)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"memory: expected bytes, a whole number from {least} to {most}, found {shown(value)}")
    return value


def rounds(value: int) -> int:
    """Rounds of a measurement."""
    if not 3 <= value <= MOST_ROUNDS:
        raise UsageError(f"--rounds: expected a whole number from 3 to {MOST_ROUNDS}, found {shown(value)}")
    return value


def agreement(value: float | None) -> float | None:
    """A share of examples."""
    if value is not None and not 0 <= value <= 1:
        raise UsageError(f"--agreement: expected a number in [0, 1], as 0.98, found {value}")
    return value


def error(value: float | None) -> float | None:
    """A relative error."""
    if value is not None and not 0 <= value < math.inf:
        raise UsageError(f"--error: expected a number of at least 0, as 0.05, found {value}")
    return value


def seconds(value: float, where: str = "--timeout") -> float:
    """A time limit."""
    if not 0 < value <= LONGEST_SECONDS:
        raise UsageError(f"{where}: expected seconds above 0 and at most {LONGEST_SECONDS}, found {value}")
    return value


def mean(text: str | None) -> str | None:
    """A mean for each channel."""
    numbers("--mean", text)
    return text


def std(text: str | None) -> str | None:
    """A standard deviation for each channel, above 0, as inputs are divided by it."""
    if any(number <= 0 for number in numbers("--std", text) or ()):
        raise UsageError(f"--std: expected positive numbers, found {shown(text)}")
    return text


def resize(text: str | None) -> str | None:
    """A size of images."""
    size("--resize", text)
    return text


def budget(entries: Sequence[str]) -> dict[str, float]:
    """``["macs=0.5,params=0.6"]`` -> ``{"macs": 0.5, "params": 0.6}``; the names are checked later."""
    found: dict[str, float] = {}
    for entry in (part for text in entries for part in text.split(",")):
        name, _, value = (part.strip() for part in entry.partition("="))
        if name in found:
            raise UsageError(f"--budget: expected each name once, found {shown(name)} more than once")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"--budget: expected NAME=PART as macs=0.5, found {shown(entry)}") from None
    return found


MOST_BUDGETS = 100
"""Most points of a sweep."""


def budgets(text: str) -> list[float]:
    """``0.8..0.1`` in steps of a tenth, ``0.8..0.1:10`` as so many evenly spaced ones, or ``0.5,0.3``."""
    try:
        if ".." not in text:
            return [float(part) for part in text.split(",")]
        ends, _, number = text.partition(":")
        first, last = (float(part) for part in ends.split(".."))
        count = int(number) if number else round(abs(first - last) / 0.1) + 1
        if not 2 <= count <= MOST_BUDGETS:
            raise ValueError
        return [round(first + (last - first) * index / (count - 1), 4) for index in range(count)]
    except (ValueError, OverflowError):
        raise UsageError(
            f"--budgets: expected 0.8..0.1, 0.8..0.1:10 for ten of them, or 0.5,0.3, found {shown(text)}"
        ) from None


def keep(text: str | None) -> dict[str, float] | None:
    """``0.98`` or ``error=0.02``; the measure's name is checked later."""
    if text is None:
        return None
    name, _, value = text.rpartition("=")
    try:
        return {name.strip() or "agreement": float(value)}
    except ValueError:
        raise UsageError(f"--keep: expected a number as 0.98, or error=0.02, found {shown(text)}") from None


def outputs(entries: Sequence[str]) -> dict[str, tuple[str, float]]:
    """``NAME=KIND`` or ``NAME=KIND:WEIGHT``; names and kinds are checked later."""
    found: dict[str, tuple[str, float]] = {}
    for entry in entries:
        name, _, said = entry.rpartition("=")
        kind, _, weight = said.partition(":")
        if not name.strip() or not kind.strip():
            raise UsageError(f"--output: expected NAME=KIND or NAME=KIND:WEIGHT, as output=logits, found {entry!r}")
        if name.strip() in found:
            raise UsageError(f"--output: {name.strip()!r} is named twice; name it once")
        try:
            found[name.strip()] = kind.strip(), float(weight or 1)
        except ValueError:
            raise UsageError(f"--output: expected a number behind the colon, found {entry!r}") from None
    return found


def numbers(option: str, text: str | None) -> list[float] | None:
    """``0.485,0.456,0.406`` -> its numbers, which are finite."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option}: expected numbers separated by commas, found {shown(text)}") from None
    if not all(map(math.isfinite, found)):
        raise UsageError(f"{option}: expected finite numbers, found {shown(text)}")
    return found


def size(option: str, text: str | None) -> tuple[int, int] | None:
    """``256x192`` -> height and width, each at most LONGEST_SIDE."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise UsageError(f"{option}: expected HxW, as 256x256, found {shown(text)}")
    if max(map(len, match.groups())) > len(str(LONGEST_SIDE)) or max(int(match[1]), int(match[2])) > LONGEST_SIDE:
        raise UsageError(f"{option}: expected at most {LONGEST_SIDE} pixels a side, found {shown(text)}")
    return int(match[1]), int(match[2])


def named_shape(entry: str) -> tuple[str | None, str]:
    """``images=1x3x320x320`` -> the name and the shape; without a name None and the entry."""
    name, equals, shape = entry.rpartition("=")
    return (name, shape) if equals and re.fullmatch(r"[0-9x]+", shape) else (None, entry)


def example_target(entries: Sequence[str]) -> str | None:
    """The one ``FILE.py:NAME`` or ``pkg.mod:NAME`` among the values of ``--input``; None where all of them are shapes."""
    targets = [entry for entry in entries if ":" in entry and named_shape(entry)[0] is None]
    if not targets:
        return None
    if len(entries) > 1:
        raise UsageError(
            f"--input: expected shapes, as 1x3x64x64, or one FILE.py:NAME that gives all inputs, "
            f"found {shown(' '.join(entries))}"
        )
    return targets[0]


def free_axes(names: str | Sequence[str], where: str = "--free-axes") -> tuple[str, ...]:
    """Names of axes, each once; text is one name."""
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Iterable):
        raise UsageError(f'{where}: expected names one by one, as ("batch", "height"), found {shown(names)}')
    strange = [name for name in names if name not in AXES]
    if strange or len(set(names)) < len(names):
        found = shown(",".join(map(str, names)))
        raise UsageError(f"{where}: expected none, or each once of {', '.join(AXES)}, found {found}")
    return tuple(names)


def axes_of_text(text: str) -> tuple[str, ...]:
    """``batch,height`` -> ``("batch", "height")``; ``none`` means no axes."""
    return () if text == "none" else free_axes(text.split(","))


def beside(limit: float, value: float, form: str) -> str:
    """The value in this form, such as ``.3g``, or in as many digits more as it takes to tell on which side of the limit it is."""
    more = (f".{int(form[1:-1]) + extra}{form[-1]}" for extra in range(17))
    sides = (value > limit, value < limit)
    texts = (format(value, each) for each in more)
    return next((text for text in texts if (float(text) > limit, float(text) < limit) == sides), repr(value))


def share(part: float) -> str:
    """A share to a hundredth of a percent, for tables of single figures: ``98.25%``; less than all is never ``100.00%``."""
    return f"{min(part, 0.9999) if part < 1 else part:.2%}"


def shift(ratio: float) -> str:
    """What a ratio changes, in percent with its sign: ``-62``; what leaves something is never ``-100``."""
    if ratio >= 0.995 or math.isnan(ratio):
        return f"+{max(100 * (ratio - 1), 0):.0f}"
    return f"-{beside(100, 100 * (1 - ratio), '.0f')}"


def cosine(value: float) -> str:
    """To four digits, or in as many more as it takes to tell it from 1."""
    return beside(1, value, ".4f")


def apart(one: float, other: float) -> tuple[str, str]:
    """Two different numbers in three digits, or in as many more as it takes to tell them apart."""
    texts = ((f"{one:.{digits}g}", f"{other:.{digits}g}") for digits in range(3, 17))
    return next((pair for pair in texts if pair[0] != pair[1]), (repr(one), repr(other)))
