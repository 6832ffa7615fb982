"""Names that are too long for a file: none is there, as for any other name that is not known."""

from collections.abc import Callable

import pytest
import torch
from commands import images, small_network

import convrewrite
from convrewrite.errors import ConvRewriteError
from convrewrite.loading import load_model

LONG = "x" * 300

ASKED: dict[str, Callable[[], object]] = {
    "a model": lambda: load_model(f"{LONG}.pt"),
    "a graph": lambda: convrewrite.optimize(f"{LONG}.onnx"),
    "a result": lambda: convrewrite.load(LONG, small_network()),
    "int8 of a result": lambda: convrewrite.quantise(LONG, small_network(), images(2)[:1], images()),
    "a file to verify": lambda: convrewrite.verify(f"{LONG}.onnx", small_network(), torch.zeros(1, 3, 16, 16)),
}


@pytest.mark.parametrize("what", list(ASKED))
def test_it_is_refused_in_words(what: str) -> None:
    with pytest.raises(ConvRewriteError, match=r"(?s)xxx.*(no such file|missing|expected)"):
        ASKED[what]()
