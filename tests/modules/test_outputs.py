from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from convrewrite.errors import TraceError
from convrewrite.modules.outputs import alike, left_out, named_outputs

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


@dataclass
class Scores:
    logits: Tensor
    loss: Tensor | None = None
    aux: tuple[Tensor, ...] = ()


class ScoresDict(dict[str, object]):
    pass


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (A, {"output": A}),
        ((A, B), {"output.0": A, "output.1": B}),
        ([A, [B, C]], {"output.0": A, "output.1.0": B, "output.1.1": C}),
        ({"z": B, "a": A}, {"output.z": B, "output.a": A}),
        (Scores(A), {"output.logits": A}),
        (Scores(A, aux=(B, C)), {"output.logits": A, "output.aux.0": B, "output.aux.1": C}),
        ({"logits": A, "aux": (None, B)}, {"output.logits": A, "output.aux.1": B}),
        (ScoresDict(logits=A), {"output.logits": A}),
        (Pair(A, B), {"output.first": A, "output.second": B}),
        ((A, 3, "text", None), {"output.0": A}),
    ],
)
def test_names_and_order(output: object, expected: dict[str, Tensor]) -> None:
    named = named_outputs(output)
    assert list(named) == list(expected)
    assert all(named[name] is expected[name] for name in expected)


@pytest.mark.parametrize("output", [None, 3, (), {"a": None}, "text", b"text", Scores])
def test_no_tensor_is_an_error(output: object) -> None:
    with pytest.raises(
        TraceError, match=r"at least one tensor, found .*where it only wraps a network, .* give that network"
    ):
        named_outputs(output)


def test_what_is_no_tensor_is_left_out_with_its_type() -> None:
    output = {"a": A, "loss": 0.5, "aux": [None, "text", (B, 3)], "more": {}, "scores": Scores(A, loss=None)}
    assert left_out(output) == ("output.loss (float)", "output.aux.1 (str)", "output.aux.2.1 (int)")
    assert left_out(A) == left_out(None) == ()


def test_equal_names_are_an_error() -> None:
    with pytest.raises(TraceError, match=r"output\.a\.b"):
        named_outputs({"a.b": A, "a": {"b": B}})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("units", [1e3, 1e4])
def test_other_numbers_are_not_alike_in_any_precision(dtype: torch.dtype, units: float) -> None:
    values = torch.linspace(-1, 1, 8).to(dtype)
    for other in (values.flip(0), 0.9 * values, values + 0.1):
        assert not alike({"": values}, {"": other}, units)
    assert alike({"": values}, {"": values * (1 + 3 * torch.finfo(dtype).eps)}, units)
