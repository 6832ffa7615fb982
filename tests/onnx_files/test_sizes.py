"""What an ONNX file takes on the disk."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convrewrite.onnx_files.placing import size_of


def test_weights_count_in_whatever_file_they_lie(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.ones((64, 64), np.float32), name) for name in ("w", "v")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])
    model = helper.make_model(helper.make_graph(nodes, "net", [x], [y], weights))
    onnx.save(model, tmp_path / "whole.onnx")
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.onnx.data")
    files = [tmp_path / "net.onnx", tmp_path / "net.onnx.data"]
    assert size_of(files[0]) == sum(file.stat().st_size for file in files) > 2 * 64 * 64 * 4
    assert size_of(tmp_path / "whole.onnx") == (tmp_path / "whole.onnx").stat().st_size


def test_weights_count_that_a_branch_or_a_constant_keeps_elsewhere(tmp_path: Path) -> None:
    def outside(name: str) -> TensorProto:
        tensor = numpy_helper.from_array(np.ones((64, 64), np.float32), name)
        (tmp_path / f"{name}.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{name}.bin")
        return tensor

    x, c = (helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64]), helper.make_tensor_value_info("c", 9, []))
    z, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "zy")
    held = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["z"])], "then", [], [z], [outside("w")])
    constant = helper.make_node("Constant", [], ["v"], value=outside("v"))
    other = helper.make_graph([constant, helper.make_node("MatMul", ["x", "v"], ["z"])], "else", [], [z])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=held, else_branch=other)
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(helper.make_graph([choice], "net", [x, c], [y])), path)
    assert size_of(path) == path.stat().st_size + 2 * 64 * 64 * 4
