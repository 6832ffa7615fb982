"""A caller's function is another one where its code differs, or anything that it holds."""

from collections.abc import Callable
from functools import cache, cached_property, partial
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convrewrite.tuning import code_of


def scaled(batch: Tensor, by: float = 1.0) -> Tensor:
    return batch * by


class Scale:
    """As transforms are that are objects: what they do is in their state."""

    def __init__(self, by: object) -> None:
        self.by, self.itself = by, self

    def __call__(self, batch: Tensor) -> Tensor:
        return batch * self.by  # type: ignore[operator]

    def applied(self, batch: Tensor) -> Tensor:
        return self(batch)


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, batch: Tensor) -> Tensor:
        return batch * self.by


def enclosed(by: float) -> Callable[[Tensor], Tensor]:
    return lambda batch: batch * by


def defaulted(by: float) -> Callable[[Tensor], Tensor]:
    def multiplied(batch: Tensor, by: float = by) -> Tensor:
        return batch * by

    return multiplied


def typed_in(by: float) -> Callable[[Tensor], Tensor]:
    """Has no source that could be read."""
    known: dict[str, Any] = {}
    exec(f"def typed(batch): return batch * {by}", known)
    return known["typed"]  # type: ignore[no-any-return]


def reading(known: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A function that reads a constant, and a module, through another one; both functions stay as they are."""
    known = {"BY": 1.0, "own": None, **known}
    exec(
        "def function(batch): return [helper(batch) for _ in (1, 2)]\ndef helper(batch): return batch * (BY or own.BY)",
        known,
    )
    return known["function"]  # type: ignore[no-any-return]


def module_of(by: float) -> ModuleType:
    own = ModuleType("own")
    own.BY, own.__file__ = by, "own.py"  # type: ignore[attr-defined]
    return own


def of_class(by: float) -> Callable[[Tensor], Tensor]:
    class Scaled(Slotted):
        factor = by

        def __call__(self, batch: Tensor) -> Tensor:
            return batch * self.factor

    return Scaled(0.0)


def attributed(by: float) -> Callable[[Tensor], Tensor]:
    def multiplied(batch: Tensor) -> Tensor:
        return batch * multiplied.by  # type: ignore[attr-defined,no-any-return]

    multiplied.by = by  # type: ignore[attr-defined]
    return multiplied


def computed_once(by: float) -> Callable[[Tensor], Tensor]:
    class Scaled(Slotted):
        factor = cached_property(lambda _: by)

    return Scaled(0.0)


def inherited(by: float) -> Callable[[Tensor], Tensor]:
    class Below(type(of_class(by))):  # type: ignore[misc]
        pass

    return Below(0.0)  # type: ignore[no-any-return]


MAKERS: dict[str, Callable[[float], Callable[[Tensor], Tensor]]] = {
    "partial": lambda by: partial(scaled, by=by),
    "object": Scale,
    "slots": Slotted,
    "method": lambda by: Scale(by).applied,
    "closure": enclosed,
    "default": defaulted,
    "typed in": typed_in,
    "tensor": lambda by: Scale(torch.full((3,), by)),
    "array": lambda by: Scale(np.full(3, by)),
    "nested": lambda by: nn.Sequential(nn.Identity(), nn.Threshold(by, 0.0)),
    "functions": lambda by: Scale({"all": [partial(scaled, by=by)]}),
    "set": lambda by: Scale({by, "a"}),
    "constant of a helper": lambda by: reading({"BY": by}),
    "constant of a module": lambda by: reading({"own": module_of(by)}),
    "attribute of a class": of_class,
    "attribute of a base": inherited,
    "attribute of a function": attributed,
    "property that is kept": computed_once,
    "remembering": lambda by: Scale(cache(defaulted(by))),
    "lambdas on a line": lambda by: (lambda batch: batch + 1) if by == 1.0 else (lambda batch: batch + 2),
    "generator": lambda by: Scale(np.random.default_rng(int(by))),
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_function_holds_is_part_of_it(name: str) -> None:
    told = [code_of(MAKERS[name](by)) for by in (1.0, 1.0, 2.0)]
    assert told[0] == told[1] != told[2] and None not in told


def test_what_cannot_be_told_is_no_code() -> None:
    assert code_of(Scale(Lock())) is None
    assert code_of(Scale([object() for _ in range(20_000)])) is None
