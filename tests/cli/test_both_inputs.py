"""How many examples two models are compared on, and the limits that they are held to."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from convrewrite.cli.both_inputs import Both, for_both
from convrewrite.cli.options import Sources
from convrewrite.errors import CalibrationError, VerificationError
from convrewrite.meanings import Fidelity
from convrewrite.meanings.fidelity import OutputFidelity
from convrewrite.onnx_files import OnnxModel
from convrewrite.pipeline.relations import Relation
from convrewrite.runtime.comparison import verify


def file(folder: Path, batch: int | str) -> OnnxModel:
    """An ONNX model that takes so many examples at a time."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path = folder / f"{batch}.onnx"
    onnx.save(model, str(path))
    return OnnxModel(path)


def test_two_files_take_whole_batches_of_both(tmp_path: Path) -> None:
    free, two, three = (file(tmp_path, size) for size in ("n", 2, 3))
    x = torch.randn(14, 2)

    def both(first: OnnxModel | nn.Module, second: OnnxModel | nn.Module, count: int = 14) -> Both:
        return Both(first, second, (x[:count],), ())

    pairs = [(free, free), (two, free), (free, three), (two, two), (two, three), (three, two), (nn.ReLU(), three)]
    assert [both(*pair).batch for pair in pairs] == [None, 2, 3, 2, 6, 6, 3]
    whole = both(two, three).whole_batches()
    assert torch.equal(whole.inputs[0], x[:12])
    assert whole.notes == ("the last 2 inputs were left out: a model takes 6 at a time",)
    assert verify(two, three, whole.inputs).parity.passed
    assert both(two, free).whole_batches().inputs[0] is not None and not both(two, free).whole_batches().notes
    with pytest.raises(CalibrationError, match="expected at least 6, as a model takes so many at a time, found 5"):
        both(three, two, 5).whole_batches()


def test_a_state_is_held_for_as_many_examples_as_it_has(tmp_path: Path) -> None:
    shapes = {"x": ["n", 5, 4], "state": [1, "n", 4], "y": ["n", 5, 4]}
    x, state, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("RNN", ["steps", "w", "r", "", "", "state"], ["all"], hidden_size=4),
        helper.make_node("Squeeze", ["all", "one"], ["states"]),
        helper.make_node("Transpose", ["states"], ["y"], perm=[1, 0, 2]),
    ]
    weights = [numpy_helper.from_array(np.ones((1, 4, 4), np.float32), name) for name in ("w", "r")]
    weights.append(numpy_helper.from_array(np.array([1]), "one"))
    graph = helper.make_graph(nodes, "recurrent", [x, state], [y], weights)
    path = tmp_path / "recurrent.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    both = for_both(OnnxModel(path), OnnxModel(path), Sources(), 0, ())
    assert both.batch == 1
    assert verify(both.first, both.second, both.inputs).parity.passed


def test_limits_and_what_misses_them_are_told_in_their_digits() -> None:
    fidelity = Fidelity((OutputFidelity("a", 2e-5, 0.97994, 0.1), OutputFidelity("b", 0.5)), 8)
    for agreement in (0.9799, None):
        Relation.require_fidelity(fidelity, agreement, 0.5)
    with pytest.raises(VerificationError, match=r"^a: relative error 2e-05 exceeds 1e-05$"):
        Relation.require_fidelity(fidelity, None, 1e-5)
    with pytest.raises(VerificationError, match=r"^b: relative error 0.5 exceeds 0.4$"):
        Relation.require_fidelity(fidelity, None, 0.4)
    with pytest.raises(VerificationError, match=r"^a: top-1 agreement 0.97994 is below 0.98$"):
        Relation.require_fidelity(fidelity, 0.98, None)
    numbers = Fidelity(fidelity.outputs[1:], 8)
    with pytest.raises(VerificationError, match="--agreement: expected an output of class scores, found none"):
        Relation.require_fidelity(numbers, 0.5, None)
