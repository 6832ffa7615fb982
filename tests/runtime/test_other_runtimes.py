"""A runtime of another package that gives what is no outputs, or cannot say its version, is told of."""

from typing import Any

import numpy as np
import pytest
import torch

from convrewrite.errors import UsageError, VerificationError
from convrewrite.runtime.parity import RunningParity
from convrewrite.targets import discovery, target_of

EXPECTED = {"output": torch.zeros(2, 3)}


@pytest.mark.parametrize("given", [None, 3, "text"])
def test_outputs_come_in_a_list(given: Any) -> None:
    with pytest.raises(VerificationError, match=r"^other: expected a list of 1 outputs, found .*; mend the runtime"):
        RunningParity("other").add_arrays(EXPECTED, given)


@pytest.mark.parametrize("given", ["text", None, object(), [[1.0], [1.0, 2.0]]])
def test_outputs_are_arrays_of_numbers(given: Any) -> None:
    with pytest.raises(
        VerificationError, match=r"^other: output 'output': expected an array of numbers, found .*; mend"
    ):
        RunningParity("other").add_arrays(EXPECTED, [given])
    RunningParity("other").add_arrays(EXPECTED, [np.zeros((2, 3), np.float32)])


class Broken:
    name, package, takes = "broken", "broken-runtime", "onnx"

    def __init__(self, option: str = "") -> None:
        self.option = option

    def version(self) -> str:
        raise OSError("libbroken.so: cannot open")


def test_a_version_that_cannot_be_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "kinds_of_targets", lambda: {"broken": Broken})
    with pytest.raises(
        UsageError, match=r"--runtime broken: .* raised OSError: libbroken.so: .*reinstall broken-runtime"
    ):
        target_of("broken")
