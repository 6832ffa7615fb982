"""The worst of several outputs, figure by figure: what is said of a model whose outputs are told apart elsewhere."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class ComparedOutput(Protocol):
    """How near one output of a model is to the original's; None for figures that it does not have."""

    @property
    def relative_error(self) -> float:
        """Of numbers; of integers and booleans the share of entries that differ."""

    @property
    def top1_agreement(self) -> float | None:
        """The share of examples with the same class."""

    @property
    def kl(self) -> float | None:
        """A divergence in nats."""

    @property
    def equal_share(self) -> float | None:
        """The share of integers or booleans that are equal."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The worst figures of some outputs, each None where no output has it: the least ``agreement`` and ``equal`` share, the
    largest ``kl`` in nats, the largest relative ``error`` of all outputs, and ``number_error``, that of outputs that are numbers.
    A figure that is not a number is the worst there is."""

    agreement: float | None
    kl: float | None
    error: float | None
    number_error: float | None
    equal: float | None

    @classmethod
    def of(cls, outputs: Iterable[ComparedOutput]) -> "Worst":
        """From the figures of all of them."""
        rows = list(outputs)
        return cls(
            agreement=_smallest(row.top1_agreement for row in rows),
            kl=_largest(row.kl for row in rows),
            error=_largest(row.relative_error for row in rows),
            number_error=_largest(row.relative_error for row in rows if row.equal_share is None),
            equal=_smallest(row.equal_share for row in rows),
        )


def _largest(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return next(filter(math.isnan, known), max(known, default=None))


def _smallest(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return next(filter(math.isnan, known), min(known, default=None))
