"""ONNX files from elsewhere: loops without end, memory without measure, crashes; one message, and exit code 3."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import call, small_network
from onnx import NodeProto, TensorProto, helper, numpy_helper

import convrewrite
from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.onnx_files import probing
from convrewrite.onnx_files.model import OnnxModel

INPUTS = (torch.zeros(1, 3, 16, 16),)
MEAN = helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0)


def write(path: Path, nodes: Sequence[NodeProto], **constants: Any) -> Path:
    """A graph from ``input`` (b, 3, 16, 16) to ``output``."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["b", 3, 16, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        initializer=[numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def endless(value: str) -> NodeProto:
    """A loop that goes on as long as true is true."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [info("i", TensorProto.INT64, []), info("on", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, None)],
        [info("still", TensorProto.BOOL, []), info("w", TensorProto.FLOAT, None)],
    )
    return helper.make_node("Loop", ["", "true", value], ["looped"], body=body)


def test_a_loop_without_end_is_left(tmp_path: Path) -> None:
    mean = helper.make_node("ReduceMean", ["looped"], ["output"], axes=[1, 2, 3], keepdims=0)
    path = write(tmp_path / "loop.onnx", [endless("input"), mean], true=True)
    model = OnnxModel(path, probe=1.0)
    with pytest.raises(ModelLoadError, match=r"loop\.onnx.*runs on these inputs within 1 s.*does not end in that time"):
        model(*INPUTS)
    torch.save(small_network(), tmp_path / "net.pt")
    ran = call("verify", tmp_path / "net.pt", path, "--input", "1x3x16x16", "--timeout", "1")
    assert ran.code == 3
    assert "--timeout" in ran.message
    taking: Sequence[Callable[[], object]] = (
        lambda: convrewrite.verify(path, path, INPUTS, timeout=1),
        lambda: convrewrite.analyze(path, INPUTS, timeout=1),
        lambda: convrewrite.optimize(path, INPUTS, timeout=1, measure=False),
    )
    for take in taking:
        with pytest.raises(ModelLoadError, match=r"within 1 s .*, in Python timeout=300\)"):
            take()


def test_a_loop_over_constants_is_left(tmp_path: Path) -> None:
    add = helper.make_node("Add", ["mean", "looped"], ["output"])
    path = write(tmp_path / "loop.onnx", [endless("zero"), MEAN, add], true=True, zero=np.float32(0))
    with pytest.raises(ModelLoadError, match="does not end in that time"):
        OnnxModel(path, probe=2.0)(*INPUTS)


def test_memory_without_measure_is_refused(tmp_path: Path) -> None:
    fill = helper.make_node("ConstantOfShape", ["size"], ["filled"])
    parts = [fill, helper.make_node("ReduceMean", ["filled"], ["f"], keepdims=0), MEAN]
    path = write(tmp_path / "fill.onnx", [*parts, helper.make_node("Add", ["mean", "f"], ["output"])], size=[10**12])
    with pytest.raises(
        ModelLoadError, match=r"fill\.onnx: onnxruntime cannot .* within \d+ bytes of memory: .*allocate"
    ):
        OnnxModel(path, probe=20.0)(*INPUTS)


def test_a_run_that_fails_and_inputs_that_do_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "r.onnx", [helper.make_node("Reshape", ["input", "to"], ["output"])], to=[7, 11])
    torch.save(small_network(), tmp_path / "net.pt")
    ran = call("verify", tmp_path / "net.pt", path, "--input", "1x3x16x16")
    assert ran.code == 3
    assert "r.onnx: onnxruntime cannot run it on these inputs" in ran.message
    with pytest.raises(UsageError, match=r"expected shape \(b, 3, 16, 16\), found \(1, 3, 16, 15\)"):
        OnnxModel(path, probe=20.0)(torch.zeros(1, 3, 16, 15))
    with pytest.raises(ModelLoadError, match="cannot run it on these inputs"):
        OnnxModel(path)(*INPUTS)


def test_a_crash_of_the_runtime_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.onnx", [helper.make_node("Identity", ["input"], ["output"])])
    monkeypatch.setattr(probing, "_PROGRAM", "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(ModelLoadError, match=r"onnxruntime crashed \(SIGSEGV\)"):
        OnnxModel(path, probe=20.0)


def test_an_input_that_states_too_many_numbers(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 10**6, 10**6])
    out = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "g", [value], [out])
    path = tmp_path / "x.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    ran = call("verify", path, path)
    assert ran.code == 2
    assert "at most 67108864 numbers, found a shape of 1x1000000x1000000" in ran.message


def test_a_file_that_behaves_gives_what_it_computes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.onnx", [helper.make_node("Neg", ["input"], ["output"])])
    inputs = torch.randn(2, 3, 16, 16)
    assert torch.equal(OnnxModel(path, probe=20.0)(inputs)["output"], -inputs)


def test_outputs_that_are_no_tensors(tmp_path: Path) -> None:
    out = helper.make_tensor_sequence_value_info("output", TensorProto.FLOAT, None)
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["b", 3, 16, 16])
    node = helper.make_node("SequenceConstruct", ["input"], ["output"])
    graph = helper.make_graph([node], "g", [value], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "x.onnx")
    with pytest.raises(ModelLoadError, match="found that 'output' is list"):
        OnnxModel(tmp_path / "x.onnx", probe=20.0)(*INPUTS)


def test_an_output_of_a_type_that_numpy_lacks(tmp_path: Path) -> None:
    out = helper.make_tensor_value_info("output", TensorProto.BFLOAT16, None)
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["b", 3, 16, 16])
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input"], ["output"], to=TensorProto.BFLOAT16)], "g", [value], [out]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "x.onnx")
    with pytest.raises(ModelLoadError, match="let its outputs be float32"):
        OnnxModel(tmp_path / "x.onnx", probe=20.0)(*INPUTS)
