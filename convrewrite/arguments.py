"""The values of options that are more than a word or a number, read from text. A UsageError names the option."""

import re
from collections.abc import Sequence

from convrewrite.errors import UsageError


def budget(entries: Sequence[str]) -> dict[str, float]:
    """``["macs=0.5,params=0.6"]`` -> ``{"macs": 0.5, "params": 0.6}``; which names there are is for the plan to say."""
    found: dict[str, float] = {}
    for entry in (part for text in entries for part in text.split(",")):
        name, _, value = entry.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UsageError(f"--budget: expected NAME=PART as macs=0.5, found {entry!r}") from None
    return found


def keep(text: str | None) -> dict[str, float] | None:
    """``0.98`` or ``error=0.02``; which measures there are is for the plan to say."""
    if text is None:
        return None
    name, _, value = text.rpartition("=")
    try:
        return {name.strip() or "agreement": float(value)}
    except ValueError:
        raise UsageError(f"--keep: expected a number as 0.98, or error=0.02, found {text!r}") from None


def outputs(entries: Sequence[str]) -> dict[str, tuple[str, float]]:
    """``NAME=KIND`` or ``NAME=KIND:WEIGHT``; which names and kinds there are is for the model to say."""
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
    """``0.485,0.456,0.406`` -> its numbers."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option}: expected numbers separated by commas, found {text!r}") from None


def size(option: str, text: str | None) -> tuple[int, int] | None:
    """``256x192`` -> height and width."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise UsageError(f"{option}: expected HxW, as 256x256, found {text!r}")
    return int(match[1]), int(match[2])


def example_target(entries: Sequence[str]) -> str | None:
    """The one ``FILE.py:NAME`` or ``pkg.mod:NAME`` among the values of ``--input``; None where all of them are shapes."""
    targets = [entry for entry in entries if ":" in entry]
    if not targets:
        return None
    if len(entries) > 1:
        raise UsageError(
            f"--input: expected shapes, as 1x3x64x64, or one FILE.py:NAME that gives all inputs, found {' '.join(entries)}"
        )
    return targets[0]
