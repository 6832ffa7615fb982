"""Sizes of a model's inputs, where the report of a result states them."""

import math
from dataclasses import dataclass
from pathlib import Path

from convrewrite import results
from convrewrite.cli.interrupts import INT8
from convrewrite.errors import ModelLoadError
from convrewrite.loading import MOST_NUMBERS
from convrewrite.values import shape_text


@dataclass(frozen=True, slots=True)
class KnownSizes:
    """The shape of every input, one example each, and the report that says so."""

    shapes: tuple[tuple[int, ...], ...]
    report: Path

    @property
    def note(self) -> str:
        """A sentence that states the assumption."""
        return f"input size {shape_text(*self.shapes)} taken from {self.report}"


def sizes_of(*sources: str | Path) -> KnownSizes | None:
    """The sizes in the report of the first source that is a result folder or a file of one; None where no report states any, or
    only larger ones than an example has: a report may come from anyone, and a model is run on them."""
    for path in map(Path, sources):
        folder = path.parent if path.name in (*results.FILES, INT8) else path
        try:
            report = results.read_report(folder)
        except ModelLoadError:
            continue
        shapes = tuple((1, *shape[1:]) for shape in report.input_shapes)
        if shapes and all(math.prod(shape) <= MOST_NUMBERS for shape in shapes):
            return KnownSizes(shapes, folder / "report.json")
    return None
