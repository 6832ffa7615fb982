"""How inputs are read, as one value."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from convrewrite import values
from convrewrite.conv import Size
from convrewrite.errors import CalibrationError, UsageError
from convrewrite.settings import MEMORY, FieldKind, require_kinds

_NUMBERS = FieldKind("a number, or one for each channel", lambda value: _are(Real, value))

_KINDS: Mapping[str, FieldKind] = {
    "mean": _NUMBERS,
    "std": _NUMBERS,
    "resize": FieldKind("a height and a width", lambda value: _are(Integral, value) and len(value) == 2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How inputs are read.

    Attributes:
        limit: most examples; None: 1,024, or all for a recovery. From a source of known length they are drawn at random, from any
            other the first are taken.
        batch: examples in a batch; None: 32, fewer if inputs are large.
        seed: of what is drawn, and of the split.
        mean, std: one number, or one for each channel: they normalise the first input, uint8 scaled to [0, 1] before.
        resize: height and width to which images of a folder are scaled before the model's size is cut from the centre.
        memory: most bytes that are read, from whatever source.

    Raises UsageError for a value of another kind, and CalibrationError for a limit or a batch below 1.
    """

    limit: int | None = None
    batch: int | None = None
    seed: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize: Size | None = None
    memory: int = MEMORY

    def __post_init__(self) -> None:
        for name in ("mean", "std", "resize"):
            object.__setattr__(self, name, _one_by_one(getattr(self, name)))
        require_kinds(self, _KINDS)
        values.seed(self.seed, "seed")
        if not isinstance(self.memory, int) or isinstance(self.memory, bool):
            raise UsageError(f"memory: expected bytes, a whole number, found {values.shown(self.memory)}")
        if any(number is not None and number < 1 for number in (self.limit, self.batch)):
            raise CalibrationError(f"limit and batch: expected at least 1, found {self.limit} and {self.batch}")


class ReadingOptions(TypedDict, total=False):
    """The fields of :class:`Reading` as keyword arguments."""

    limit: int | None
    batch: int | None
    seed: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    resize: Size | None
    memory: int


def _one_by_one(value: Any) -> Any:
    """Numbers of an array or a list, or a single one, as a tuple; what is no number stays as it is."""
    plain = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    if isinstance(plain, Real):
        return (plain,)
    return tuple(plain) if isinstance(plain, Iterable) and not isinstance(plain, Mapping | str | bytes) else plain


def _are(kind: type, value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)
