"""Graphs that take so many examples at a time, from reading inputs to parity and fidelity."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx_texts import CLASSIFIER, CLASSIFIER_SHAPES, graph

import convrewrite

TWELVE = CLASSIFIER.replace("float[N, 3, 16, 16]", "float[12, 3, 16, 16]").replace("float[N, 10]", "float[12, 10]")
BOUND = TWELVE.replace("i = Flatten(h)", "sizes = Constant<value_ints = [12, 32]>() i = Reshape(h, sizes)")


@pytest.mark.parametrize(
    ("text", "basis"),
    [(TWELVE, "measured on 3 held-out calibration inputs"), (BOUND, "measured on the 12 inputs that the factors")],
    ids=["the file alone", "the module too"],
)
def test_a_graph_of_more_examples_than_parity_is_told_on(tmp_path: Path, text: str, basis: str) -> None:
    onnx.save(graph(text, CLASSIFIER_SHAPES), tmp_path / "model.onnx")
    given = torch.randn(13, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    report = convrewrite.optimize(
        tmp_path / "model.onnx", rules=["separable"], calibration=given, fast=True, any_speed=True
    ).report
    assert report.parity and all(output.passed for output in report.parity)
    assert report.fidelity_basis.startswith(basis)
    assert report.totals.macs.after < report.totals.macs.before


def test_a_recovery_tells_of_the_batches_that_it_trained_on(tmp_path: Path) -> None:
    onnx.save(graph(BOUND, CLASSIFIER_SHAPES), tmp_path / "model.onnx")
    source, given = tmp_path / "model.onnx", torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    result = convrewrite.optimize(source, rules=["separable"], calibration="weights", measure=False)
    found = convrewrite.recover(result, source, given, epochs=1, batch=16, measure=False).report.recovered
    assert found is not None and found.settings["batch"] == 12
