"""The worst of several outputs."""

import math
from dataclasses import dataclass

from convrewrite.worst import Worst


@dataclass(frozen=True)
class Row:
    relative_error: float
    top1_agreement: float | None = None
    kl: float | None = None
    equal_share: float | None = None


def test_every_figure_is_that_of_its_worst_output() -> None:
    rows = [Row(0.1, 0.9, 0.02), Row(0.3), Row(0.5, equal_share=0.5), Row(0.2, 0.8, 0.01)]
    assert Worst.of(rows) == Worst(agreement=0.8, kl=0.02, error=0.5, number_error=0.3, equal=0.5)
    assert Worst.of([]) == Worst(None, None, None, None, None)


def test_what_is_no_number_is_the_worst_wherever_it_stands() -> None:
    for rows in ([Row(math.nan), Row(1.0)], [Row(1.0), Row(math.nan)], [Row(math.inf), Row(math.nan)]):
        assert math.isnan(Worst.of(rows).error or 0.0)
